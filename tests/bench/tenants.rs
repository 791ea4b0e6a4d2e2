//! Row `tenants`: how long members of tenants wait for the answer to their join, when many join and one of each tenant does
//! not read, and beside a large tenant that is busy; how many join a second; and what the broker needs for each member.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio::time::{interval, sleep};
use wgkex_tests::key;
use wgkex_tests::stack::{Bus, Plan, Stack};

use crate::measure::{memory, percentile};
use crate::table::{Report, mebibytes, milliseconds, ratio};

/// Members of each tenant.
const EACH: u32 = 10;
/// Joins per second.
const RATE: u32 = 200;
/// Clients that join at the same time, where it is to go as fast as it can.
const AT_ONCE: u32 = 64;
/// Members of the large tenant that leave and join again all the time, and how long they stay.
const BUSY: u32 = 4;
const STAY: Duration = Duration::from_millis(500);
/// What is wanted of a join.
const JOIN: Duration = Duration::from_millis(100);
/// What a member may take of the broker's memory, in KiB.
const MEMBER: u32 = 64;
/// A pong of a client, masked with zeros.
const PONG: &[u8] = b"\x8a\x80\0\0\0\0";

/// A member's connection.
type Connection = BufReader<TcpStream>;

/// Measures with so many members, ten in each tenant.
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
    let (mut times, open) = runtime.block_on(join_all(server, "rate", members));
    let [full, peak] = memory(pid);
    drop(open);
    let there = stack.metric("wgkex_broker_tenants_members").unwrap_or_default();
    let [p50, p99] = percentiles(&mut times);
    let what = format!("{members} joins, {RATE}/s, one of {EACH} does not read");
    let line = report.line(what, format!("p50 {}, p99 {}", milliseconds(p50), milliseconds(p99)));
    line.wanted(format!("p99 < {}", milliseconds(JOIN)), p99 < JOIN && times.len() == members as usize).print();
    let each = full.saturating_sub(empty) / members;
    let line = report.line(
        format!("memory per member, with {there} members"),
        format!("{each} KiB, in all {} (peak {})", mebibytes(full), mebibytes(peak)),
    );
    let line = line.against(format!("without members {}", mebibytes(empty)), f64::from(full) / f64::from(empty));
    line.wanted(format!("<= {MEMBER} KiB"), each <= MEMBER).print();
}

/// How many join a second when nobody waits for a turn.
fn at_once(report: Report, members: u32) {
    let (stack, runtime) = stack();
    let tenants = (members / EACH).max(1);
    let began = Instant::now();
    let mut times = runtime.block_on(fill(stack.http, members, move |n| format!("{}", n % tenants)));
    let rate = f64::from(members) / began.elapsed().as_secs_f64();
    let [p50, p99] = percentiles(&mut times);
    let measured = format!("{rate:.0} joins/s, p50 {}, p99 {}", milliseconds(p50), milliseconds(p99));
    report.line(format!("{members} joins, {AT_ONCE} at once, {EACH} members each"), measured).print();
}

/// Whether members of a large tenant that come and go keep others waiting.
fn beside_a_large_one(report: Report, members: u32) {
    let (stack, runtime) = stack();
    let server = stack.http;
    let began = Instant::now();
    let joined = runtime.block_on(fill(server, members, |_| "large".into()));
    let filled = began.elapsed();
    assert_eq!(joined.len(), members as usize, "all join the large tenant");
    let [quiet, busy] = runtime.block_on(async {
        let (quiet, _open) = join_all(server, "quiet", members / 4).await;
        let is_over = Arc::new(AtomicBool::new(false));
        let busy: Vec<_> = (0..BUSY).map(|n| tokio::spawn(come_and_go(server, members + n, is_over.clone()))).collect();
        let (times, _open) = join_all(server, "busy", members / 4).await;
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

/// How long each join took, from its message to its answer; and the connections of those that do not read. The names of their
/// tenants begin with `prefix`.
async fn join_all(server: SocketAddr, prefix: &'static str, members: u32) -> (Vec<Duration>, Vec<Connection>) {
    let mut joins = JoinSet::new();
    let mut ticks = interval(Duration::from_secs(1) / RATE);
    // Spread, so that the first of each tenant, which does not read, is there for all others.
    let tenants = (members / EACH).max(1);
    for n in 0..members {
        ticks.tick().await;
        joins
            .spawn(async move { Ok::<_, io::Error>((n, join(server, &format!("{prefix}{}", n % tenants), n).await?)) });
    }
    let (mut times, mut unread) = (Vec::new(), Vec::new());
    for (n, (time, connection)) in joins.join_all().await.into_iter().filter_map(Result::ok) {
        times.push(time);
        if n < tenants {
            unread.push(connection);
        } else {
            tokio::spawn(stay(connection));
        }
    }
    // The broker has sent all announcements.
    sleep(Duration::from_secs(2)).await;
    (times, unread)
}

/// Joins as fast as that goes, and stays. Returns how long each took.
async fn fill(
    server: SocketAddr,
    members: u32,
    tenant: impl Fn(u32) -> String + Clone + Send + 'static,
) -> Vec<Duration> {
    let next = Arc::new(AtomicU32::new(0));
    let mut callers = JoinSet::new();
    for _ in 0..AT_ONCE {
        let (next, tenant) = (next.clone(), tenant.clone());
        callers.spawn(async move {
            let mut times = Vec::new();
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= members {
                    return times;
                }
                if let Ok((time, connection)) = join(server, &tenant(n), n).await {
                    times.push(time);
                    tokio::spawn(stay(connection));
                }
            }
        });
    }
    callers.join_all().await.concat()
}

async fn come_and_go(server: SocketAddr, n: u32, is_over: Arc<AtomicBool>) -> io::Result<()> {
    while !is_over.load(Ordering::Relaxed) {
        let member = join(server, "large", n).await?;
        sleep(STAY).await;
        drop(member);
    }
    Ok(())
}

/// Joins at the same rate until it is over; those that joined stay as long.
pub fn keep_joining(server: SocketAddr, is_over: &AtomicBool) {
    Runtime::new().unwrap().block_on(async {
        let mut ticks = interval(Duration::from_secs(1) / RATE);
        for n in 0.. {
            ticks.tick().await;
            if is_over.load(Ordering::Relaxed) {
                return;
            }
            tokio::spawn(async move { stay(join(server, &format!("{}", n / EACH), n).await?.1).await });
        }
    });
}

async fn join(server: SocketAddr, tenant: &str, n: u32) -> io::Result<(Duration, Connection)> {
    let stream = TcpStream::connect(server).await?;
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
    let message = format!(r#"{{"display_name":"{n:05}","public_key":"{}"}}"#, key(n));
    let length = u8::try_from(message.len()).map_err(io::Error::other)?;
    let frame = [&[0x81, 0x80 | length, 0, 0, 0, 0], message.as_bytes()].concat();
    let begun = Instant::now();
    stream.write_all(&frame).await?;
    // The answer is a text, perhaps in fragments.
    let mut first = read_frame(&mut stream).await?;
    while first & 0x80 == 0 {
        first = read_frame(&mut stream).await?;
    }
    let time = begun.elapsed();
    if first & 0x0f == 8 { Err(io::Error::other("refused")) } else { Ok((time, stream)) }
}

/// Reads what comes, and answers pings.
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
