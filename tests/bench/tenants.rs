//! Row `tenants`: time from a member's join to its answer, when many join and one of each tenant is stalled, and beside
//! a large tenant that is busy; joins per second; and the broker's memory per member.

use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpSocket, TcpStream};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio::time::{interval, sleep};
use wgkex_tests::key;
use wgkex_tests::stack::{Bus, Plan, Stack};

use crate::measure::{memory, percentile};
use crate::table::{Report, mebibytes, milliseconds, ratio};

/// Members of each tenant.
const MEMBERS_PER_TENANT: u32 = 10;
/// Joins per second.
const RATE: u32 = 200;
/// Clients that join at the same time, where joins are to be as fast as possible.
const AT_ONCE: u32 = 64;
/// Members of the large tenant that repeatedly leave and join, and how long they stay.
const BUSY: u32 = 4;
const STAY: Duration = Duration::from_millis(500);
/// Members with long names that come and go in each tenant before the others join, with 1.6 KB each: in all more than a stalled
/// member's connection takes, which is 128 KiB in the broker's kernel, and its own buffer.
const UNREAD: u32 = 100;
/// The bytes that a stalled member's kernel is to keep for it.
const STALLED_BUFFER: u32 = 4096;
/// How often a stalled member sends a pong.
const BEAT: Duration = Duration::from_secs(5);
/// The limit for a join.
const JOIN: Duration = Duration::from_millis(100);
/// The limit of the broker's memory per member, in KiB.
const MEMBER: u32 = 64;
/// A pong of a client, masked with zeros.
const PONG: &[u8] = b"\x8a\x80\0\0\0\0";

/// A member's connection.
type Connection = BufReader<TcpStream>;

/// Measures with so many members, ten in each tenant, one of them stalled.
pub fn measure(report: Report, members: u32) {
    at_a_rate(report, members);
    at_once(report, members);
    beside_a_large_one(report, members / 5 * 4);
}

fn stack() -> (Stack, Runtime) {
    (Stack::start(Plan::new(Bus::Embedded).config("tenants: {enabled: true}")), Runtime::new().unwrap())
}

fn at_a_rate(report: Report, members: u32) {
    let (mut stack, runtime) = stack();
    let (server, pid) = (stack.http, stack.broker().pid());
    let [empty, _] = memory(pid);
    let tenants = tenants(members);
    runtime.block_on(stall(server, "rate", tenants));
    let mut times = runtime.block_on(join_all(server, "rate", tenants..members));
    let [full, peak] = memory(pid);
    let there = stack.metric("wgkex_broker_tenants_members").unwrap_or_default();
    let [p50, p99] = percentiles(&mut times);
    let what = format!("{} joins, {RATE}/s, beside a stalled member in each of {tenants} tenants", members - tenants);
    let line = report.line(what, format!("p50 {}, p99 {}", milliseconds(p50), milliseconds(p99)));
    let are_all_there = there >= f64::from(members);
    line.wanted(format!("p99 < {}, all are there", milliseconds(JOIN)), p99 < JOIN && are_all_there).print();
    let each = full.saturating_sub(empty) / members;
    let line = report.line(
        format!("memory per member, with {there} members"),
        format!("{each} KiB, in all {} (peak {})", mebibytes(full), mebibytes(peak)),
    );
    let line = line.against(format!("without members {}", mebibytes(empty)), f64::from(full) / f64::from(empty));
    line.wanted(format!("<= {MEMBER} KiB"), each <= MEMBER).print();
}

/// Joins per second without pauses.
fn at_once(report: Report, members: u32) {
    let (stack, runtime) = stack();
    let tenants = tenants(members);
    let began = Instant::now();
    let mut times = runtime.block_on(fill(stack.http, members, move |n| format!("{}", n % tenants)));
    let rate = f64::from(members) / began.elapsed().as_secs_f64();
    let [p50, p99] = percentiles(&mut times);
    let measured = format!("{rate:.0} joins/s, p50 {}, p99 {}", milliseconds(p50), milliseconds(p99));
    report.line(format!("{members} joins, {AT_ONCE} at once, {MEMBERS_PER_TENANT} members each"), measured).print();
}

/// Whether members that join and leave a large tenant delay other joins.
fn beside_a_large_one(report: Report, members: u32) {
    let (stack, runtime) = stack();
    let server = stack.http;
    let began = Instant::now();
    let joined = runtime.block_on(fill(server, members, |_| "large".into()));
    let filled = began.elapsed();
    assert_eq!(joined.len(), members as usize, "all join the large tenant");
    let [quiet, busy] = runtime.block_on(async {
        let quiet = join_all(server, "quiet", 0..members / 4).await;
        let is_over = Arc::new(AtomicBool::new(false));
        let busy: Vec<_> = (0..BUSY).map(|n| tokio::spawn(come_and_go(server, members + n, is_over.clone()))).collect();
        let times = join_all(server, "busy", 0..members / 4).await;
        is_over.store(true, Ordering::Relaxed);
        for busy in busy {
            busy.await.unwrap().unwrap();
        }
        [quiet, times]
    });
    let [quiet, busy] = [quiet, busy].map(|mut times| percentiles(&mut times));
    let shown = |times: [Duration; 2]| times.map(milliseconds).join(", ");
    report.line(format!("a tenant of {members} members, {AT_ONCE} at once"), milliseconds(filled)).print();
    let what = format!("joins of others, {RATE}/s, while {BUSY} members of it leave and join: p50, p99");
    let line = report.line(what, shown(busy)).against(format!("without: {}", shown(quiet)), ratio(busy[0], quiet[0]));
    line.wanted(format!("p99 < {}", milliseconds(JOIN)), busy[1] < JOIN).print();
}

fn percentiles(times: &mut [Duration]) -> [Duration; 2] {
    [50, 99].map(|share| percentile(times, share))
}

/// The number of tenants for so many members.
fn tenants(members: u32) -> u32 {
    (members / MEMBERS_PER_TENANT).max(1)
}

/// Members of so many tenants that send pongs and read nothing after their answer, while more messages are queued for
/// them than their connections take. The names of the tenants begin with `prefix`.
async fn stall(server: SocketAddr, prefix: &'static str, tenants: u32) {
    for n in 0..tenants {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(STALLED_BUFFER).unwrap();
        let stream = socket.connect(server).await.unwrap();
        let (_, connection) = join_by(stream, &format!("{prefix}{n}"), "stalled", &key(n)).await.unwrap();
        tokio::spawn(show_life(connection));
    }
    let name = "\\u0001".repeat(255);
    // Few keys, so that few addresses are held, and none of them twice at the same time.
    let keys = tenants * (2 * AT_ONCE).div_ceil(tenants);
    let visit = move |n| {
        let name = name.clone();
        async move {
            let stream = TcpStream::connect(server).await?;
            join_by(stream, &format!("{prefix}{}", n % tenants), &name, &key(u32::MAX - n % keys)).await.map(drop)
        }
    };
    let visits = each(UNREAD * tenants, visit).await.len();
    assert_eq!(visits, (UNREAD * tenants) as usize, "all came");
}

/// Sends pongs for a member that reads nothing.
async fn show_life(mut stream: Connection) -> io::Result<()> {
    loop {
        sleep(BEAT).await;
        stream.write_all(PONG).await?;
    }
}

/// Members of these numbers join, and stay; returns the time of each from its message to its answer. The names of their
/// tenants begin with `prefix`.
async fn join_all(server: SocketAddr, prefix: &'static str, numbers: Range<u32>) -> Vec<Duration> {
    let mut joins = JoinSet::new();
    let mut ticks = interval(Duration::from_secs(1) / RATE);
    let tenants = tenants(numbers.end);
    for n in numbers {
        ticks.tick().await;
        joins.spawn(async move { join_and_stay(server, &format!("{prefix}{}", n % tenants), n).await });
    }
    let times = joins.join_all().await.into_iter().filter_map(Result::ok).collect();
    // The broker has sent all announcements.
    sleep(Duration::from_secs(2)).await;
    times
}

/// Joins as fast as possible, and stays. Returns the time of each join.
async fn fill(
    server: SocketAddr,
    members: u32,
    tenant: impl Fn(u32) -> String + Clone + Send + 'static,
) -> Vec<Duration> {
    each(members, move |n| {
        let tenant = tenant(n);
        async move { join_and_stay(server, &tenant, n).await }
    })
    .await
}

async fn join_and_stay(server: SocketAddr, tenant: &str, n: u32) -> io::Result<Duration> {
    let (time, connection) = join(server, tenant, n).await?;
    tokio::spawn(stay(connection));
    Ok(time)
}

/// Runs `work` with each number below `count`, [`AT_ONCE`] at the same time. Returns the results of those that
/// succeeded.
async fn each<T, F>(count: u32, work: impl Fn(u32) -> F + Clone + Send + 'static) -> Vec<T>
where
    T: Send + 'static,
    F: Future<Output = io::Result<T>> + Send,
{
    let next = Arc::new(AtomicU32::new(0));
    let mut callers = JoinSet::new();
    for _ in 0..AT_ONCE {
        let (next, work) = (next.clone(), work.clone());
        callers.spawn(async move {
            let mut done = Vec::new();
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= count {
                    return done;
                }
                done.extend(work(n).await);
            }
        });
    }
    callers.join_all().await.into_iter().flatten().collect()
}

async fn come_and_go(server: SocketAddr, n: u32, is_over: Arc<AtomicBool>) -> io::Result<()> {
    while !is_over.load(Ordering::Relaxed) {
        let member = join(server, "large", n).await?;
        sleep(STAY).await;
        drop(member);
    }
    Ok(())
}

/// Joins at the same rate until `is_over`; members stay as long.
pub fn keep_joining(server: SocketAddr, is_over: &AtomicBool) {
    Runtime::new().unwrap().block_on(async {
        let mut ticks = interval(Duration::from_secs(1) / RATE);
        for n in 0.. {
            ticks.tick().await;
            if is_over.load(Ordering::Relaxed) {
                return;
            }
            tokio::spawn(async move { stay(join(server, &format!("{}", n / MEMBERS_PER_TENANT), n).await?.1).await });
        }
    });
}

async fn join(server: SocketAddr, tenant: &str, n: u32) -> io::Result<(Duration, Connection)> {
    join_by(TcpStream::connect(server).await?, tenant, &format!("{n:05}"), &key(n)).await
}

/// Joins on an open connection; `name` as it is in JSON.
async fn join_by(stream: TcpStream, tenant: &str, name: &str, key: &str) -> io::Result<(Duration, Connection)> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    let head = format!(
        "GET /tenants/{tenant} HTTP/1.1\r\nHost: b\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    let mut received = Vec::new();
    while !received.ends_with(b"\r\n\r\n") {
        received.push(stream.read_u8().await?);
    }
    let message = format!(r#"{{"display_name":"{name}","public_key":"{key}"}}"#);
    let frame = text_frame(&message)?;
    let begun = Instant::now();
    stream.write_all(&frame).await?;
    // The answer is a text message, perhaps in fragments.
    let mut first = read_frame(&mut stream).await?;
    while first & 0x80 == 0 {
        first = read_frame(&mut stream).await?;
    }
    let time = begun.elapsed();
    if first & 0x0f == 8 { Err(io::Error::other("refused")) } else { Ok((time, stream)) }
}

/// A text message of a client, masked with zeros.
fn text_frame(text: &str) -> io::Result<Vec<u8>> {
    let length = u16::try_from(text.len()).map_err(io::Error::other)?;
    let [high, low] = length.to_be_bytes();
    let head = if length < 126 { vec![0x81, 0x80 | low] } else { vec![0x81, 0xfe, high, low] };
    Ok([&head[..], &[0; 4], text.as_bytes()].concat())
}

/// Reads all frames, and answers pings.
async fn stay(mut stream: Connection) -> io::Result<()> {
    loop {
        if read_frame(&mut stream).await? & 0x0f == 9 {
            stream.write_all(PONG).await?;
        }
    }
}

/// Reads a frame; returns its first byte.
async fn read_frame(stream: &mut Connection) -> io::Result<u8> {
    let first = stream.read_u8().await?;
    let length = match stream.read_u8().await? {
        126 => stream.read_u16().await?.into(),
        127 => stream.read_u64().await?,
        short => short.into(),
    };
    let mut payload = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    stream.read_exact(&mut payload).await?;
    Ok(first)
}
