//! Many routers at once, from any number of loopback addresses, without a thread for each.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

/// The `n`th loopback address for routers, which no other client or server uses.
#[must_use]
pub fn address(n: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(127, 1, 0, 1).to_bits() + n)
}

/// Connects to `server` from `source`.
pub async fn connect_from(source: Ipv4Addr, server: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((source, 0).into())?;
    let stream = socket.connect(server).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// POSTs `body`, with more headers as whole lines with their line ends; returns the status once the answer is read.
pub async fn post(stream: &mut TcpStream, path: &str, headers: &str, body: &str) -> io::Result<u16> {
    let head = format!("POST {path} HTTP/1.1\r\nHost: broker\r\nContent-Type: application/json\r\n{headers}");
    stream.write_all(format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).as_bytes()).await?;
    let mut answer = Vec::with_capacity(1024);
    loop {
        if stream.read_buf(&mut answer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(status) = status(&answer) {
            return Ok(status);
        }
    }
}

/// The status of an answer, if all of it is there.
fn status(answer: &[u8]) -> Option<u16> {
    let text = str::from_utf8(answer).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    })?;
    if body.len() < length { None } else { head.get(9..12)?.parse().ok() }
}
