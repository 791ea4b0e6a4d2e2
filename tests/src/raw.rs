//! A client that sends what it is told, byte by byte if need be, and answers nothing by itself.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};

use bytes::BytesMut;
use rumqttc::{Connect, ConnectReturnCode, LastWill, Packet, Publish, QoS, Subscribe, SubscribeFilter};

use crate::DEADLINE;

/// A client's socket.
pub struct Raw {
    stream: TcpStream,
    input: BytesMut,
    unsent: Vec<u8>,
}

impl Raw {
    /// A TCP connection on which nothing is said yet.
    #[must_use]
    pub fn dial(server: SocketAddr) -> Self {
        let stream = TcpStream::connect(server).expect("the server takes a connection");
        stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        stream.set_nodelay(true).expect("an option");
        Self { stream, input: BytesMut::new(), unsent: Vec::new() }
    }

    /// A client that is let in.
    #[must_use]
    pub fn connect(server: SocketAddr, id: &str) -> Self {
        let (raw, code) = Self::try_connect(server, &connect(id));
        assert_eq!(code, Some(ConnectReturnCode::Success), "{id}");
        raw
    }

    /// A client that is let in or not, and what it hears of that; nothing if the connection just ends.
    #[must_use]
    pub fn try_connect(server: SocketAddr, connect: &Connect) -> (Self, Option<ConnectReturnCode>) {
        let mut raw = Self::dial(server);
        raw.send(&Packet::Connect(connect.clone()));
        let answer = raw.read();
        match answer {
            Some(Packet::ConnAck(answer)) => (raw, Some(answer.code)),
            None => (raw, None),
            Some(other) => panic!("{other:?} instead of a CONNACK"),
        }
    }

    /// Sends a packet. That nobody takes it is no failure.
    pub fn send(&mut self, packet: &Packet) {
        let mut bytes = BytesMut::new();
        packet.write(&mut bytes, usize::MAX).expect("a packet");
        self.send_bytes(&bytes);
    }

    /// Sends any bytes.
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    /// Sends bytes, or some of them and the rest next time, as far as there is a place for them on the way.
    pub fn send_if_taken(&mut self, bytes: &[u8]) {
        if self.unsent.is_empty() {
            self.unsent.extend(bytes);
        }
        self.stream.set_nonblocking(true).expect("an option");
        let taken = self.stream.write(&self.unsent).unwrap_or(0);
        self.stream.set_nonblocking(false).expect("an option");
        self.unsent.drain(..taken);
    }

    /// Says something.
    pub fn publish(&mut self, topic: &str, payload: impl Into<Vec<u8>>, level: u8, retain: bool) {
        let qos = rumqttc::qos(level).expect("a quality");
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
    pub fn hear(&mut self) -> Publish {
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

    /// Ends the connection without a word.
    pub fn hang_up(self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// A CONNECT of this client that may be silent for ever.
#[must_use]
pub fn connect(id: &str) -> Connect {
    Connect { keep_alive: 0, ..Connect::new(id) }
}

/// The same, with a last will.
#[must_use]
pub fn connect_with_will(id: &str, topic: &str, payload: &str) -> Connect {
    Connect { last_will: Some(LastWill::new(topic, payload, QoS::AtLeastOnce, true)), ..connect(id) }
}
