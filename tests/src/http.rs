//! HTTP as a router or an operator sends it, down to the bytes.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use serde_json::Value;

use crate::DEADLINE;

/// One connection, kept as long as both sides want.
#[derive(Debug)]
pub struct Http {
    stream: BufReader<TcpStream>,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The headers, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body, as text.
    pub body: String,
}

impl Http {
    /// Connects.
    #[must_use]
    pub fn connect(server: SocketAddr) -> Self {
        Self::try_connect(server).unwrap_or_else(|error| panic!("connect to {server}: {error}"))
    }

    /// Connects if the server listens.
    pub fn try_connect(server: SocketAddr) -> std::io::Result<Self> {
        let stream = TcpStream::connect_timeout(&server, DEADLINE)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Sends a request and reads the answer. `headers` are whole lines; host and length are added.
    #[must_use]
    pub fn request(&mut self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> Response {
        let length = format!("Content-Length: {}", body.len());
        let length = (!body.is_empty() || method == "POST").then_some(length.as_str());
        let first = format!("{method} {path} HTTP/1.1");
        let lines = [first.as_str(), "Host: broker"].into_iter().chain(length).chain(headers.iter().copied());
        let request = lines.chain(["", ""]).collect::<Vec<_>>().join("\r\n");
        self.send(&[request.as_bytes(), body].concat());
        self.response(method)
    }

    /// GETs `path`.
    #[must_use]
    pub fn get(&mut self, path: &str) -> Response {
        self.request("GET", path, &[], b"")
    }

    /// The same, and the error if there is no answer.
    pub fn try_get(&mut self, path: &str) -> std::io::Result<Response> {
        self.try_send(format!("GET {path} HTTP/1.1\r\nHost: program\r\n\r\n").as_bytes())?;
        self.try_response("GET")
    }

    /// Sends `body` to `path` as a router does: with the content type of a form, whatever it is.
    #[must_use]
    pub fn post(&mut self, path: &str, body: &str) -> Response {
        self.request("POST", path, &["Content-Type: application/x-www-form-urlencoded"], body.as_bytes())
    }

    /// The same, and the error if there is no answer.
    pub fn try_post(&mut self, path: &str, body: &str) -> std::io::Result<Response> {
        let head = format!("POST {path} HTTP/1.1\r\nHost: broker\r\nContent-Length: {}\r\n\r\n", body.len());
        self.try_send(&[head.as_bytes(), body.as_bytes()].concat())?;
        self.try_response("POST")
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) {
        self.try_send(bytes).expect("send a request");
    }

    /// The same, and the error if the connection has ended.
    pub fn try_send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.get_mut().write_all(bytes)
    }

    /// Reads the answer to a request of `method`.
    #[must_use]
    pub fn response(&mut self, method: &str) -> Response {
        self.try_response(method).unwrap_or_else(|error| panic!("read an answer: {error}"))
    }

    /// Reads the answer to a request of `method`, if there is one.
    pub fn try_response(&mut self, method: &str) -> std::io::Result<Response> {
        let status_line = self.line()?;
        let status = status_line.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).and_then(|s| s.parse().ok());
        let status = status.ok_or_else(|| std::io::Error::other(format!("not a status line: {status_line:?}")))?;
        let mut headers = Vec::new();
        loop {
            let line = self.line()?;
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').ok_or_else(|| std::io::Error::other(line.clone()))?;
            headers.push((name.to_lowercase(), value.trim().to_owned()));
        }
        let mut response = Response { status, headers, body: String::new() };
        if method != "HEAD" {
            response.body = self.body(&response)?;
        }
        Ok(response)
    }

    fn body(&mut self, head: &Response) -> std::io::Result<String> {
        assert_eq!(head.header("transfer-encoding"), None, "the broker knows how long its answers are");
        let length = head.header("content-length").expect("an answer has a length").parse().expect("a length");
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        String::from_utf8(body).map_err(std::io::Error::other)
    }

    /// Reads the first line of an answer that may be of any version.
    #[must_use]
    pub fn first_line(&mut self) -> String {
        self.line().unwrap_or_else(|error| panic!("read an answer: {error}"))
    }

    fn line(&mut self) -> std::io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    }
}

impl Response {
    /// The value of a header, named in lower case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(header, _)| header == name).map(|(_, value)| value.as_str())
    }

    /// The body as JSON.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("not JSON: {error} in {self:?}"))
    }
}

/// The body of a router's request.
#[must_use]
pub fn ask(domain: &str, key: &str) -> String {
    format!(r#"{{"domain":"{domain}","public_key":"{key}"}}"#)
}
