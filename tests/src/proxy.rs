//! A TCP proxy between a program and a server: slow, losing messages without a trace, altering bytes, or leading to the
//! first of several servers that accepts connections, as a name with several addresses does.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// The most pieces in transit on a slow line; more wait at their sender.
const UNDER_WAY: usize = 16;
/// The maximum size of a piece.
const PIECE: usize = 1024;

/// The behaviour of the proxy.
#[derive(Debug, Clone, Copy)]
pub enum ProxyMode {
    /// Forwards all bytes unchanged.
    Good,
    /// Each connection is slow, in both directions.
    Slow {
        /// The least time for which each byte is in transit.
        delay: Duration,
        /// The highest rate, in bytes per second.
        rate: u32,
    },
    /// One of so many keys is not delivered, and the server receives an acknowledgement of it.
    Dropping(u32),
    /// The server receives the second text, of the same length, in the place of the first one.
    Replacing(&'static str, &'static str),
}

/// The proxy. When it is dropped it takes no new connections; existing ones end with their clients.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    mode: ProxyMode,
    keys: AtomicU32,
    dropped: AtomicU32,
    is_over: AtomicBool,
}

impl Proxy {
    /// A proxy from `listen` to the first of the servers that accepts a connection, in the network namespace of the
    /// calling thread.
    #[must_use]
    pub fn start(listen: SocketAddr, servers: Vec<SocketAddr>, mode: ProxyMode) -> Self {
        let listener = TcpListener::bind(listen).unwrap_or_else(|error| panic!("listen on {listen}: {error}"));
        listener.set_nonblocking(true).expect("a listener that does not block");
        let (keys, dropped, is_over) = Default::default();
        let shared = Arc::new(Shared { mode, keys, dropped, is_over });
        let proxy = Self { shared: shared.clone() };
        thread::spawn(move || {
            while !shared.is_over.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((client, _)) => drop(connect(client, &servers, &shared)),
                    Err(_) => thread::sleep(Duration::from_millis(10)),
                }
            }
        });
        proxy
    }

    /// The number of keys it has dropped.
    #[must_use]
    pub fn dropped(&self) -> u32 {
        self.shared.dropped.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Relaxed);
    }
}

/// Connects client and server until one of them closes.
fn connect(client: TcpStream, servers: &[SocketAddr], shared: &Arc<Shared>) -> io::Result<()> {
    client.set_nonblocking(false)?;
    let mut reached =
        servers.iter().filter_map(|server| TcpStream::connect_timeout(server, Duration::from_secs(5)).ok());
    let server = reached.next().ok_or(io::ErrorKind::ConnectionRefused)?;
    for end in [&client, &server] {
        end.set_nodelay(true)?;
    }
    match shared.mode {
        ProxyMode::Good => {
            for (from, to) in [(client.try_clone()?, server.try_clone()?), (server, client)] {
                thread::spawn(move || copy(from, to));
            }
        }
        ProxyMode::Slow { delay, rate } => {
            for (from, to) in [(client.try_clone()?, server.try_clone()?), (server, client)] {
                thread::spawn(move || slowly(from, to, delay, rate));
            }
        }
        ProxyMode::Replacing(original, replacement) => {
            let (from_client, to_server) = (client.try_clone()?, server.try_clone()?);
            thread::spawn(move || replace(from_client, to_server, original, replacement));
            thread::spawn(move || copy(server, client));
        }
        ProxyMode::Dropping(every) => {
            let to_server = Arc::new(Mutex::new(server.try_clone()?));
            let (from_client, acknowledging) = (client.try_clone()?, to_server.clone());
            thread::spawn(move || {
                let _ = forward(from_client, &to_server);
            });
            let shared = shared.clone();
            thread::spawn(move || {
                let _ = forward_some(server, client, &acknowledging, every, &shared);
            });
        }
    }
    Ok(())
}

fn copy(mut from: TcpStream, mut to: TcpStream) {
    let _ = io::copy(&mut from, &mut to);
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

/// The text must be in one read, as the statement of a database is.
fn replace(mut from: TcpStream, mut to: TcpStream, original: &str, replacement: &str) {
    assert_eq!(original.len(), replacement.len(), "the same length");
    let mut piece = vec![0; 64 * PIECE];
    while let Ok(length @ 1..) = from.read(&mut piece) {
        let piece = &mut piece[..length];
        for at in 0..length {
            if piece[at..].starts_with(original.as_bytes()) {
                piece[at..at + original.len()].copy_from_slice(replacement.as_bytes());
            }
        }
        if to.write_all(piece).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

fn slowly(mut from: TcpStream, mut to: TcpStream, delay: Duration, rate: u32) {
    let (sender, under_way) = sync_channel::<(Instant, Vec<u8>)>(UNDER_WAY);
    let mut deliver = move |under_way: Receiver<(Instant, Vec<u8>)>| {
        for (due, bytes) in under_way {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
            thread::sleep(Duration::from_secs(bytes.len() as u64) / rate);
        }
        let _ = to.shutdown(Shutdown::Both);
    };
    thread::spawn(move || deliver(under_way));
    let mut piece = [0; PIECE];
    while let Ok(length @ 1..) = from.read(&mut piece) {
        if sender.send((Instant::now() + delay, piece[..length].to_vec())).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
}

/// Forwards whole packets, so that an acknowledgement can be inserted between two of them.
fn forward(mut client: TcpStream, server: &Mutex<TcpStream>) -> io::Result<()> {
    loop {
        let packet = match packet(&mut client) {
            Ok(packet) => packet,
            Err(error) => {
                server.lock().unwrap_or_else(PoisonError::into_inner).shutdown(Shutdown::Both)?;
                return Err(error);
            }
        };
        server.lock().unwrap_or_else(PoisonError::into_inner).write_all(&packet)?;
    }
}

fn forward_some(
    mut server: TcpStream,
    mut client: TcpStream,
    acknowledging: &Mutex<TcpStream>,
    every: u32,
    shared: &Shared,
) -> io::Result<()> {
    loop {
        let packet = match packet(&mut server) {
            Ok(packet) => packet,
            Err(error) => {
                client.shutdown(Shutdown::Both)?;
                return Err(error);
            }
        };
        let drops = is_key(&packet) && (shared.keys.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(every);
        if !drops {
            client.write_all(&packet)?;
            continue;
        }
        shared.dropped.fetch_add(1, Ordering::Relaxed);
        if let Some([high, low]) = identifier(&packet) {
            let acknowledgement = [0x40, 2, high, low];
            acknowledging.lock().unwrap_or_else(PoisonError::into_inner).write_all(&acknowledgement)?;
        }
    }
}

/// The next packet: type and flags, the length of the rest in sevens of bits, the rest.
fn packet(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    let mut packet = byte.to_vec();
    let (mut length, mut shift) = (0, 0);
    loop {
        stream.read_exact(&mut byte)?;
        packet.push(byte[0]);
        length |= usize::from(byte[0] & 0x7f) << shift;
        shift += 7;
        if byte[0] & 0x80 == 0 {
            break;
        }
    }
    let start = packet.len();
    packet.resize(start + length, 0);
    stream.read_exact(&mut packet[start..])?;
    Ok(packet)
}

/// Whether it is a PUBLISH of a key: type 3, and after the length of the rest the topic with a length of two bytes.
fn is_key(packet: &[u8]) -> bool {
    packet[0] >> 4 == 3 && rest(packet).get(2..).is_some_and(|topic| topic.starts_with(b"wireguard/"))
}

/// The packet identifier by which a PUBLISH is acknowledged, if it has to be.
fn identifier(packet: &[u8]) -> Option<[u8; 2]> {
    let rest = rest(packet);
    let topic = usize::from(u16::from_be_bytes([rest[0], rest[1]]));
    let identifier = rest.get(2 + topic..4 + topic)?;
    (packet[0] & 0x06 != 0).then(|| [identifier[0], identifier[1]])
}

fn rest(packet: &[u8]) -> &[u8] {
    let length = packet[1..].iter().position(|byte| byte & 0x80 == 0).unwrap_or_default();
    &packet[length + 2..]
}
