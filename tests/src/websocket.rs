//! A WebSocket client with only the features that tests and benchmarks need (RFC 6455); its frames are masked with
//! zeros.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::mem::take;
use std::net::{SocketAddr, TcpStream};

use serde_json::{Value, json};

use crate::DEADLINE;

/// An open WebSocket.
#[derive(Debug)]
pub struct WebSocket {
    stream: BufReader<TcpStream>,
    /// The fragments of a text received so far.
    text: Vec<u8>,
}

/// A frame of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// A text.
    Text(String),
    /// A ping or pong.
    Control,
    /// The end, with code and reason.
    Close(u16, String),
}

impl WebSocket {
    /// Opens a WebSocket; the error has the status line of any other answer, or is that of the connection.
    pub fn open(server: SocketAddr, path: &str) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&server, DEADLINE)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.set_nodelay(true)?;
        Self::begin(stream, path)
    }

    /// The same on an open connection.
    pub fn begin(mut stream: TcpStream, path: &str) -> io::Result<Self> {
        let head = format!(
            "GET {path} HTTP/1.1\r\nHost: broker\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        stream.write_all(head.as_bytes())?;
        let mut stream = BufReader::new(stream);
        let (mut status, mut line) = (String::new(), String::new());
        stream.read_line(&mut status)?;
        while stream.read_line(&mut line)? > 2 {
            line.clear();
        }
        if status.starts_with("HTTP/1.1 101") {
            Ok(Self { stream, text: Vec::new() })
        } else {
            Err(io::Error::other(status))
        }
    }

    /// Sends a text.
    pub fn text(&mut self, text: &str) -> io::Result<()> {
        self.send(0x81, text.as_bytes())
    }

    /// Sends a frame, given its first byte.
    pub fn send(&mut self, first: u8, payload: &[u8]) -> io::Result<()> {
        let mut frame = vec![first];
        match payload.len() {
            length @ 0..126 => frame.push(0x80 | u8::try_from(length).map_err(io::Error::other)?),
            length @ 126..0x1_0000 => {
                frame.push(0xfe);
                frame.extend(u16::try_from(length).map_err(io::Error::other)?.to_be_bytes());
            }
            length => {
                frame.push(0xff);
                frame.extend((length as u64).to_be_bytes());
            }
        }
        frame.extend([0; 4]);
        frame.extend(payload);
        self.stream.get_mut().write_all(&frame)
    }

    /// The next whole text, or control frame. A ping is answered.
    pub fn receive(&mut self) -> io::Result<Frame> {
        loop {
            if let Some(frame) = self.receive_frame()? {
                return Ok(frame);
            }
        }
    }

    /// None for a fragment that is not the last.
    fn receive_frame(&mut self) -> io::Result<Option<Frame>> {
        let [first, length] = self.read()?;
        let length = match length {
            126 => u16::from_be_bytes(self.read()?).into(),
            127 => u64::from_be_bytes(self.read()?),
            short => short.into(),
        };
        let mut payload = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        self.stream.read_exact(&mut payload)?;
        Ok(Some(match first & 0x0f {
            8 => {
                let code = payload.first_chunk().copied().map_or(0, u16::from_be_bytes);
                Frame::Close(code, String::from_utf8_lossy(payload.get(2..).unwrap_or_default()).into())
            }
            9 => {
                self.send(0x8a, &payload)?;
                Frame::Control
            }
            10 => Frame::Control,
            _ => {
                self.text.extend(payload);
                if first & 0x80 == 0 {
                    return Ok(None);
                }
                Frame::Text(String::from_utf8(take(&mut self.text)).map_err(io::Error::other)?)
            }
        }))
    }

    /// The next text, as JSON; the error names code and reason if the server closes.
    pub fn message(&mut self) -> io::Result<Value> {
        loop {
            match self.receive()? {
                Frame::Text(text) => return serde_json::from_str(&text).map_err(io::Error::other),
                Frame::Control => {}
                Frame::Close(code, reason) => return Err(io::Error::other(format!("{code} {reason}"))),
            }
        }
    }

    /// Joins a tenant, and returns the answer.
    pub fn join(&mut self, name: &str, key: &str) -> io::Result<Value> {
        self.text(&json!({ "display_name": name, "public_key": key }).to_string())?;
        self.message()
    }

    /// Code and reason of the server's close frame.
    pub fn close_frame(&mut self) -> io::Result<(u16, String)> {
        loop {
            if let Frame::Close(code, reason) = self.receive()? {
                return Ok((code, reason));
            }
        }
    }

    /// The same; then answers the close frame, after which the server closes the connection.
    pub fn closed(&mut self) -> io::Result<(u16, String)> {
        let (code, reason) = self.close_frame()?;
        self.send(0x88, &code.to_be_bytes())?;
        match self.stream.read(&mut [0])? {
            0 => Ok((code, reason)),
            _ => Err(io::Error::other("more after the close frame")),
        }
    }

    /// The underlying connection.
    #[must_use]
    pub fn stream(&self) -> &TcpStream {
        self.stream.get_ref()
    }

    fn read<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}
