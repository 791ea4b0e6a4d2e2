//! Row `tenants`: how long members of tenants wait for the answer to their join, when many join and one of each tenant does
//! not read; and what the broker needs for each member.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio::time::{interval, sleep_until};
use wgkex_tests::key;
use wgkex_tests::stack::{Bus, Plan, Stack};

use crate::measure::{memory, percentile};
use crate::table::{Report, mebibytes, milliseconds};

/// Members of each tenant.
const EACH: u32 = 10;
/// Joins per second.
const RATE: u32 = 200;
/// What is wanted of a join.
const JOIN: Duration = Duration::from_millis(100);
/// What a member may take of the broker's memory, in KiB.
const MEMBER: u32 = 64;
/// A pong of a client, masked with zeros.
const PONG: &[u8] = b"\x8a\x80\0\0\0\0";

/// Measures with so many members, ten in each tenant.
pub fn measure(report: Report, members: u32) {
    let mut stack = Stack::start(Plan::new(Bus::Embedded).config("tenants: {enabled: true}"));
    let (server, pid) = (stack.http, stack.broker().pid());
    let [empty, _] = memory(pid);
    let runtime = Runtime::new().unwrap();
    let mut times = runtime.block_on(join_all(server, members));
    let [full, peak] = memory(pid);
    let there = stack.metric("wgkex_broker_tenants_members").unwrap_or_default();
    let [p50, p99] = [50, 99].map(|share| percentile(&mut times, share));
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

/// How long each join took, from its message to its answer.
async fn join_all(server: SocketAddr, members: u32) -> Vec<Duration> {
    let mut joins = JoinSet::new();
    let mut ticks = interval(Duration::from_secs(1) / RATE);
    for n in 0..members {
        ticks.tick().await;
        // Spread, so that the first of each tenant, which does not read, is there for all others.
        let tenant = n % (members / EACH).max(1);
        joins.spawn(join(server, tenant, n));
    }
    let joined = joins.join_all().await;
    let (times, open): (Vec<_>, Vec<_>) = joined.into_iter().filter_map(Result::ok).unzip();
    // The broker has sent all announcements.
    sleep_until(tokio::time::Instant::now() + Duration::from_secs(2)).await;
    drop(open);
    times
}

async fn join(server: SocketAddr, tenant: u32, n: u32) -> io::Result<(Duration, Option<TcpStream>)> {
    let mut stream = TcpStream::connect(server).await?;
    stream.set_nodelay(true)?;
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
    read_frame(&mut stream).await?;
    let time = begun.elapsed();
    let stream = if tenant == n {
        Some(stream)
    } else {
        tokio::spawn(stay(stream));
        None
    };
    Ok((time, stream))
}

/// Reads what comes, and answers pings.
async fn stay(mut stream: TcpStream) -> io::Result<()> {
    loop {
        if read_frame(&mut stream).await? == 9 {
            stream.write_all(PONG).await?;
        }
    }
}

/// Reads a frame; returns its opcode.
async fn read_frame(stream: &mut TcpStream) -> io::Result<u8> {
    let opcode = stream.read_u8().await? & 0x0f;
    let length = match stream.read_u8().await? {
        126 => stream.read_u16().await?.into(),
        127 => stream.read_u64().await?,
        short => short.into(),
    };
    let mut payload = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    stream.read_exact(&mut payload).await?;
    Ok(opcode)
}
