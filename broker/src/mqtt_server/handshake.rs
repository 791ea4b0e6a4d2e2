//! From a new TCP connection to a client that is let in, or hears why it is not.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use bytes::BytesMut;
use rumqttc::{ConnAck, Connect, ConnectReturnCode, Packet, mqttbytes};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsAcceptor;
use tracing::warn;

use crate::mqtt_server::acl::Access;
use crate::mqtt_server::filter::is_topic;
use crate::mqtt_server::message::Message;
use crate::mqtt_server::pending::Place;
use crate::mqtt_server::quota::{Account, Offence};
use crate::mqtt_server::users::{Denied, Origin, Users};

/// How long a client may take to be let in.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// How long it may take to read why it is not.
const FAREWELL: Duration = Duration::from_secs(1);
/// The largest CONNECT: strangers send it, and the will in it is kept.
const CONNECT_MAX: usize = 16 << 10;
/// The longest client id, in bytes.
const ID_MAX: usize = 1_000;
/// The version of the protocol that is spoken here: MQTT 3.1.1.
const LEVEL: u8 = 4;
/// The first byte of a TLS connection, which is none of MQTT's.
const TLS: u8 = 0x16;

/// What a client is connected by.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Where clients come in.
pub struct Door {
    /// Who may come in.
    pub users: Users,
    /// What who comes from another machine has to speak, if there is any.
    pub tls: Option<TlsAcceptor>,
    /// For how many clients there is room, these and those of other doors.
    pub room: usize,
}

/// A client that may come in.
pub struct Client {
    /// As which no other client is known.
    pub name: String,
    /// What it may do.
    pub access: Access,
    /// What it shares with other connections of its user.
    pub account: Account,
    /// The user's name; empty where there are no users.
    pub user: String,
    /// What is to be said when it is lost.
    pub will: Option<Message>,
    /// How long it may be silent.
    pub silence: Option<Duration>,
}

/// Why a client is not let in: what it hears, if it can hear anything, and what is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal(Option<ConnectReturnCode>, pub &'static str);

const PROTOCOL: Refusal = Refusal(None, "protocol");
const SILENT: Refusal = Refusal(None, "slow");
const VERSION: Refusal = Refusal(Some(ConnectReturnCode::RefusedProtocolVersion), "version");
const CLIENT_ID: Refusal = Refusal(Some(ConnectReturnCode::BadClientId), "client_id");
const PASSWORD: Refusal = Refusal(Some(ConnectReturnCode::NotAuthorized), "password");
const WILL: Refusal = Refusal(Some(ConnectReturnCode::NotAuthorized), "will");
/// There were too many wrong passwords to look at this one now.
const GUESSES: Refusal = Refusal(Some(ConnectReturnCode::ServiceUnavailable), "guesses");
/// It was not its turn in time.
pub const BUSY: Refusal = Refusal(Some(ConnectReturnCode::ServiceUnavailable), "slow");
pub const FULL: Refusal = Refusal(Some(ConnectReturnCode::ServiceUnavailable), "full");
/// Another connection took its place while it was not let in yet.
pub const EVICTED: Refusal = Refusal(None, "full");

impl Refusal {
    /// The reasons that are counted.
    pub const REASONS: [&str; 8] = ["protocol", "slow", "version", "client_id", "password", "guesses", "will", "full"];
}

impl Door {
    /// Lets a client in that says in time who it is, with what it sent behind that. It is not told yet.
    pub async fn admit(
        &self,
        stream: TcpStream,
        place: &mut Place,
    ) -> Result<(Box<dyn Stream>, BytesMut, Client), Refusal> {
        let deadline = Instant::now() + PATIENCE;
        let met = timeout_at(deadline, self.meet(stream)).await.map_err(|_| SILENT)?;
        let (mut stream, mut input) = (met.map_err(|_| PROTOCOL)?, BytesMut::new());
        let read = timeout_at(deadline, read_connect(&mut stream, &mut input)).await.unwrap_or(Err(SILENT));
        let known = match read {
            Ok(connect) => {
                let origin = Origin { client: place.client(), is_known: place.is_known() };
                // Who waits until its password is verified has a place there, which newcomers do not take.
                place.leave();
                let known = timeout_at(deadline, self.know(connect, origin)).await.unwrap_or(Err(BUSY));
                place.come_back();
                known
            }
            Err(refusal) => Err(refusal),
        };
        match known {
            Ok(client) => Ok((stream, input, client)),
            Err(refusal) => {
                refusal.tell(stream).await;
                Err(refusal)
            }
        }
    }

    /// Passwords and keys do not leave a machine unencrypted if they need not; what stays there may.
    async fn meet(&self, stream: TcpStream) -> io::Result<Box<dyn Stream>> {
        stream.set_nodelay(true)?;
        let Some(tls) = &self.tls else { return Ok(Box::new(stream)) };
        let mut first = [0];
        stream.peek(&mut first).await?;
        match first[0] {
            TLS => Ok(Box::new(tls.accept(stream).await?)),
            _ if is_near(stream.peer_addr()?.ip(), stream.local_addr()?.ip()) => Ok(Box::new(stream)),
            _ => Err(io::ErrorKind::PermissionDenied.into()),
        }
    }

    async fn know(&self, connect: Connect, origin: Origin) -> Result<Client, Refusal> {
        let Connect { keep_alive, client_id, clean_session, last_will, login, .. } = connect;
        let (user, account) = self.users.admit(login, origin).await.map_err(|denied| match denied {
            Denied::Wrong => PASSWORD,
            Denied::TooOften => GUESSES,
            Denied::Crowded => FULL,
        })?;
        let id = match client_id.as_str() {
            "" if clean_session => user.new_id(),
            id if id.is_empty() || id.len() > ID_MAX || id.contains(char::is_control) => return Err(CLIENT_ID),
            id => id.to_owned(),
        };
        let (name, access, user) = (user.client(&id).ok_or(CLIENT_ID)?, user.access(), user.into_name());
        let will = last_will.map(Message::from);
        if will.as_ref().is_some_and(|will| !is_topic(&will.topic) || !access.can_publish(&will.topic)) {
            if account.may_warn(Offence::Will) {
                warn!(user, "a last will that this user may not say");
            }
            return Err(WILL);
        }
        // This broker itself is not lost as long as it runs.
        let silence = (keep_alive > 0 && !account.is_own).then(|| Duration::from_secs(keep_alive.into()).mul_f32(1.5));
        Ok(Client { name, access, account, user, will, silence })
    }
}

impl Refusal {
    /// Says it, and waits until it was read: what is still to be read here would drop it on the way.
    pub async fn tell(self, mut stream: Box<dyn Stream>) {
        let Some(code) = self.0 else { return };
        let _ = timeout(FAREWELL, async {
            let mut output = BytesMut::new();
            let _ = Packet::ConnAck(ConnAck::new(code, false)).write(&mut output, usize::MAX);
            stream.write_all(&output).await?;
            stream.shutdown().await?;
            let mut rest = [0; 1024];
            while stream.read(&mut rest).await? > 0 {}
            io::Result::Ok(())
        })
        .await;
    }
}

/// Whether a connection does not leave this machine.
fn is_near(peer: IpAddr, own: IpAddr) -> bool {
    peer.to_canonical().is_loopback() || peer.to_canonical() == own.to_canonical()
}

async fn read_connect(stream: &mut (impl AsyncRead + Unpin), input: &mut BytesMut) -> Result<Connect, Refusal> {
    loop {
        match mqttbytes::check(input.iter(), CONNECT_MAX) {
            Ok(header) => return parse(input, header.frame_length()),
            Err(mqttbytes::Error::InsufficientBytes(_)) => {}
            Err(_) => return Err(PROTOCOL),
        }
        input.reserve(1024);
        if stream.read_buf(input).await.unwrap_or(0) == 0 {
            return Err(PROTOCOL);
        }
    }
}

fn parse(input: &mut BytesMut, length: usize) -> Result<Connect, Refusal> {
    match level(&input[..length]) {
        Some(LEVEL) => {}
        Some(_) => return Err(VERSION),
        None => return Err(PROTOCOL),
    }
    match Packet::read(input, CONNECT_MAX) {
        Ok(Packet::Connect(connect)) => Ok(connect),
        _ => Err(PROTOCOL),
    }
}

/// The protocol's version in a CONNECT: what follows it is different in each.
fn level(connect: &[u8]) -> Option<u8> {
    let (first, rest) = connect.split_first()?;
    let length_end = rest.iter().position(|byte| byte & 0x80 == 0)?;
    match (first >> 4, &rest[length_end + 1..]) {
        (1, [0, 4, b'M', b'Q', b'T', b'T', level, ..] | [0, 6, b'M', b'Q', b'I', b's', b'd', b'p', level, ..]) => {
            Some(*level)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_a_connect_of_this_version_is_read() {
        let mut connect = BytesMut::new();
        let _ = Packet::Connect(Connect::new("x")).write(&mut connect, usize::MAX).unwrap();
        let read = |bytes: &[u8]| parse(&mut bytes.into(), bytes.len());
        assert_eq!(read(&connect).map(|connect| connect.client_id), Ok("x".into()));
        for version in [3, 5, 0, 255] {
            connect[8] = version;
            assert_eq!(read(&connect).err(), Some(VERSION));
        }
        assert_eq!(read(b"\x10\x0c\0\x06MQIsdp\x03\x02\0\x3c").err(), Some(VERSION));
        for bytes in [&b"\xc0\0"[..], b"\x10\0", b"\x10\x04\0\x04MQ", b"GET / HTTP/1.1\r\n", b"\x10\x07\0\x04MQTT\x04"]
        {
            assert_eq!(read(bytes).err(), Some(PROTOCOL), "{bytes:?}");
        }
    }

    #[test]
    fn who_is_on_another_machine_is_not_near() {
        for (peer, own, near) in [
            ("127.0.0.1", "127.0.0.1", true),
            ("::1", "::1", true),
            ("::ffff:127.0.0.1", "::ffff:127.0.0.1", true),
            ("192.0.2.1", "192.0.2.1", true),
            ("::ffff:192.0.2.1", "::ffff:192.0.2.1", true),
            ("192.0.2.2", "192.0.2.1", false),
            ("::ffff:192.0.2.2", "::ffff:192.0.2.1", false),
            ("2001:db8::2", "2001:db8::1", false),
        ] {
            assert_eq!(is_near(peer.parse().unwrap(), own.parse().unwrap()), near, "{peer} to {own}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut connect = BytesMut::from(&b"\x10\0\0\x04MQTT\x04"[..]);
            connect.extend_from_slice(&bytes);
            connect[1] = u8::try_from(connect.len() - 2).unwrap();
            let length = connect.len();
            let _ = (parse(&mut connect, length), level(&bytes));
        }
    }
}
