//! An MQTT client that sends exactly the packets or bytes of a test, and acknowledges nothing by itself.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpStream};

use bytes::BytesMut;
use rumqttc::{Connect, ConnectReturnCode, LastWill, Packet, Publish, QoS, Subscribe, SubscribeFilter};
use tokio::net::TcpSocket;
use tokio::runtime;

use crate::DEADLINE;

/// The connection of such a client.
pub struct RawClient {
    stream: TcpStream,
    input: BytesMut,
    unsent: Vec<u8>,
}

impl RawClient {
    /// A TCP connection on which no packet is sent yet.
    #[must_use]
    pub fn connect_tcp(server: SocketAddr) -> Self {
        Self::of(TcpStream::connect(server).expect("the server takes a connection"))
    }

    /// The same, from this address of loopback: a client other than 127.0.0.1 for the server.
    #[must_use]
    pub fn connect_tcp_from(address: Ipv4Addr, server: SocketAddr) -> Self {
        let runtime = runtime::Builder::new_current_thread().enable_io().build().expect("a runtime");
        let stream = runtime.block_on(async {
            let socket = TcpSocket::new_v4()?;
            socket.bind(SocketAddrV4::new(address, 0).into())?;
            socket.connect(server).await?.into_std()
        });
        let stream = stream.expect("the server takes a connection");
        stream.set_nonblocking(false).expect("an option");
        Self::of(stream)
    }

    fn of(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        stream.set_nodelay(true).expect("an option");
        Self { stream, input: BytesMut::new(), unsent: Vec::new() }
    }

    /// A client that the server admits.
    #[must_use]
    pub fn connect(server: SocketAddr, id: &str) -> Self {
        let (raw, code) = Self::try_connect(server, &connect(id));
        assert_eq!(code, Some(ConnectReturnCode::Success), "{id}");
        raw
    }

    /// A client that sent this CONNECT, and the server's return code; none if the connection ends without one.
    #[must_use]
    pub fn try_connect(server: SocketAddr, connect: &Connect) -> (Self, Option<ConnectReturnCode>) {
        let mut raw = Self::connect_tcp(server);
        let code = raw.log_in(connect);
        (raw, code)
    }

    /// Sends a CONNECT and returns the server's return code; none if the connection ends without one.
    pub fn log_in(&mut self, connect: &Connect) -> Option<ConnectReturnCode> {
        self.send(&Packet::Connect(connect.clone()));
        match self.read() {
            Some(Packet::ConnAck(answer)) => Some(answer.code),
            None => None,
            Some(other) => panic!("{other:?} instead of a CONNACK"),
        }
    }

    /// Whether the server has closed the connection. Discards bytes received before that.
    pub fn has_ended(&mut self) -> bool {
        self.stream.set_nonblocking(true).expect("an option");
        let read = self.stream.read(&mut [0; 1024]);
        self.stream.set_nonblocking(false).expect("an option");
        !read.map_or_else(|error| error.kind() == ErrorKind::WouldBlock, |length| length > 0)
    }

    /// Sends a packet. A closed connection is no failure.
    pub fn send(&mut self, packet: &Packet) {
        let mut bytes = BytesMut::new();
        packet.write(&mut bytes, usize::MAX).expect("a packet");
        self.send_bytes(&bytes);
    }

    /// Sends any bytes.
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    /// Sends as many of these bytes as the socket takes without blocking; the rest is sent first by the next call.
    pub fn send_if_taken(&mut self, bytes: &[u8]) {
        if self.unsent.is_empty() {
            self.unsent.extend(bytes);
        }
        self.stream.set_nonblocking(true).expect("an option");
        let taken = self.stream.write(&self.unsent).unwrap_or(0);
        self.stream.set_nonblocking(false).expect("an option");
        self.unsent.drain(..taken);
    }

    /// A second handle of the connection, to send on it while this one is read.
    #[must_use]
    pub fn try_clone(&self) -> Self {
        Self::of(self.stream.try_clone().expect("a descriptor"))
    }

    /// Publishes a message; `level` is its quality of service.
    pub fn publish(&mut self, topic: &str, payload: impl Into<Vec<u8>>, level: u8, retain: bool) {
        let qos = rumqttc::qos(level).expect("a QoS");
        let pkid = u16::from(level > 0) * 77;
        self.send(&Packet::Publish(Publish { pkid, retain, ..Publish::new(topic, qos, payload) }));
    }

    /// Subscribes and reads the answer, which is the next packet.
    pub fn subscribe(&mut self, filters: &[(&str, QoS)]) -> Vec<rumqttc::SubscribeReasonCode> {
        let filters = filters.iter().map(|(path, qos)| SubscribeFilter::new((*path).into(), *qos));
        self.send(&Packet::Subscribe(Subscribe { pkid: 99, ..Subscribe::new_many(filters) }));
        match self.read() {
            Some(Packet::SubAck(ack)) => ack.return_codes,
            other => panic!("{other:?} instead of a SUBACK"),
        }
    }

    /// The next packet; none if the connection has ended.
    pub fn read(&mut self) -> Option<Packet> {
        loop {
            match Packet::read(&mut self.input, usize::MAX) {
                Ok(packet) => return Some(packet),
                Err(rumqttc::mqttbytes::Error::InsufficientBytes(_)) => {}
                Err(error) => panic!("the server sends nonsense: {error}"),
            }
            let mut bytes = [0; 16384];
            match self.stream.read(&mut bytes) {
                Ok(0) => return None,
                Ok(length) => self.input.extend_from_slice(&bytes[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => panic!("nothing within {DEADLINE:?}"),
                Err(_) => return None,
            }
        }
    }

    /// The next message, which is acknowledged if it has to be.
    pub fn receive(&mut self) -> Publish {
        match self.read() {
            Some(Packet::Publish(publish)) => {
                if publish.pkid > 0 {
                    self.send(&Packet::PubAck(rumqttc::PubAck { pkid: publish.pkid }));
                }
                publish
            }
            other => panic!("{other:?} instead of a message"),
        }
    }

    /// Reads to the end of the connection.
    pub fn wait_for_end(&mut self) {
        while self.read().is_some() {}
    }

    /// Closes the connection without a DISCONNECT.
    pub fn close(self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// A CONNECT of this client without a keep-alive.
#[must_use]
pub fn connect(id: &str) -> Connect {
    Connect { keep_alive: 0, ..Connect::new(id) }
}

/// The same, with a last will.
#[must_use]
pub fn connect_with_will(id: &str, topic: &str, payload: &str) -> Connect {
    Connect { last_will: Some(LastWill::new(topic, payload, QoS::AtLeastOnce, true)), ..connect(id) }
}
