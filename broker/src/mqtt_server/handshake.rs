//! From a new TCP connection to a client that is admitted, or gets a CONNACK with the reason why it is not.

use std::borrow::Cow;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use bytes::BytesMut;
use rumqttc::{ConnAck, Connect, ConnectReturnCode, Packet, mqttbytes};
use strum::{IntoStaticStr, VariantNames};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsAcceptor;

use crate::mqtt_server::acl::TopicAccess;
use crate::mqtt_server::filter::is_topic;
use crate::mqtt_server::handshake_limiter::HandshakePermit;
use crate::mqtt_server::login_queue::LoginOrigin;
use crate::mqtt_server::message::PublishedMessage;
use crate::mqtt_server::quota::Account;
use crate::mqtt_server::users::{Denied, Users};

/// How long a client may take to be admitted.
pub const LOGIN_TIMEOUT: Duration = Duration::from_secs(5);
/// How long it may take to read the CONNACK that refuses it.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);
/// The largest CONNECT, in bytes: strangers send it, and the will in it is kept.
const CONNECT_MAX: usize = 16 << 10;
/// The longest client id, in bytes.
const ID_MAX: usize = 1_000;
/// The version of the protocol that is spoken here: MQTT 3.1.1.
const PROTOCOL_LEVEL: u8 = 4;
/// How many characters of a user's name and of a client id the log shows.
const SHOWN_MAX: usize = 64;
/// The first byte of a TLS connection, which is none of MQTT's.
const TLS_RECORD: u8 = 0x16;

/// A client's connection, with or without TLS.
pub trait ClientStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> ClientStream for S {}

/// An address that clients connect to.
pub struct MqttEndpoint {
    /// The users that may log in here.
    pub users: Users,
    /// TLS, which clients of other machines have to use if there is any.
    pub tls: Option<TlsAcceptor>,
    /// For how many clients there is room, those of other endpoints included.
    pub room: usize,
}

/// A client that is admitted.
pub struct AdmittedClient {
    /// A name that no other client has: user and client id.
    pub name: String,
    /// Its rights.
    pub access: TopicAccess,
    /// The account that it shares with other connections of its user.
    pub account: Account,
    /// The user's name; empty where there are no users.
    pub user: String,
    /// The message to be published when its connection is lost.
    pub will: Option<PublishedMessage>,
    /// How long it may send nothing.
    pub keep_alive: Option<Duration>,
}

/// Why a client is not admitted; the names are the labels of metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, IntoStaticStr, VariantNames)]
#[strum(serialize_all = "snake_case")]
pub enum ConnectRefusal {
    /// It does not speak MQTT, or TLS where that is needed.
    Protocol,
    /// It did not send its CONNECT in time.
    #[strum(serialize = "slow")]
    Silent,
    /// It speaks another version of MQTT.
    Version,
    /// Its client id is none, or not one that its user may have.
    ClientId,
    /// Its password is wrong, or there is no such user.
    Password,
    /// There were too many wrong passwords to verify another one now.
    Guesses,
    /// Its user may not publish its will.
    Will,
    /// There is no room for it.
    Full,
    /// Its password was not verified in time.
    #[strum(serialize = "slow")]
    Busy,
    /// Another connection took its permit before it was admitted.
    #[strum(serialize = "full")]
    Evicted,
}

/// A connection that is refused, for the log.
#[derive(Debug)]
pub struct RefusedConnection {
    /// The reason.
    pub refusal: ConnectRefusal,
    /// Whether the user is one of the config.
    pub is_user: bool,
    /// The name and client id that it gave, if it got that far.
    pub user: Option<String>,
    /// The same of its client id.
    pub client_id: Option<String>,
    /// The reason in words.
    pub cause: Cow<'static, str>,
}

impl From<ConnectRefusal> for RefusedConnection {
    fn from(refusal: ConnectRefusal) -> Self {
        Self { refusal, is_user: false, user: None, client_id: None, cause: refusal.cause().into() }
    }
}

impl RefusedConnection {
    /// TLS was not agreed on.
    fn without_tls(error: &io::Error) -> Self {
        let text = error.to_string();
        let is_closed = matches!(
            error.kind(),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
        );
        let alerts = ["UnknownCA", "BadCertificate", "CertificateUnknown", "CertificateExpired", "DecryptError"];
        let cause = if error.kind() == io::ErrorKind::PermissionDenied {
            "it does not use TLS: mqtt.tls has to be true in its config".into()
        } else if is_closed {
            "it closed the connection before TLS was agreed on".into()
        } else if alerts.iter().any(|alert| text.contains(alert)) {
            format!("TLS: {text}: it does not accept mqtt_listen.tls.cert_file").into()
        } else {
            format!("TLS: {text}").into()
        };
        Self { cause, ..Self::from(ConnectRefusal::Protocol) }
    }

    /// Whether any stranger on the internet makes such connections, such as a port scanner.
    #[must_use]
    pub fn is_noise(&self) -> bool {
        let is_quiet =
            matches!(self.refusal, ConnectRefusal::Protocol | ConnectRefusal::Silent | ConnectRefusal::Evicted);
        is_quiet && self.cause == self.refusal.cause()
    }
}

impl ConnectRefusal {
    /// The reason in words, about the client.
    fn cause(self) -> &'static str {
        match self {
            Self::Protocol => "it does not speak MQTT",
            Self::Silent => "it sent no CONNECT in time",
            Self::Version => "it speaks another version of MQTT than 3.1.1",
            Self::ClientId => "it gives no client id that can be used",
            Self::Password => "wrong password",
            Self::Guesses => "too many wrong passwords were tried before",
            Self::Will => "its last will is on a topic on which this user may not publish",
            Self::Full => "there is no room for it",
            Self::Busy => "its password was not verified in time",
            Self::Evicted => "other connections that did not log in yet needed its place",
        }
    }

    /// The label of metrics.
    #[must_use]
    pub fn reason(self) -> &'static str {
        self.into()
    }

    /// The code of the CONNACK; none where no CONNECT was read.
    fn code(self) -> Option<ConnectReturnCode> {
        match self {
            Self::Protocol | Self::Silent | Self::Evicted => None,
            Self::Version => Some(ConnectReturnCode::RefusedProtocolVersion),
            Self::ClientId => Some(ConnectReturnCode::BadClientId),
            Self::Password | Self::Will => Some(ConnectReturnCode::NotAuthorized),
            Self::Guesses | Self::Full | Self::Busy => Some(ConnectReturnCode::ServiceUnavailable),
        }
    }
}

impl MqttEndpoint {
    /// Admits a client that sends its CONNECT in time; returns also the bytes behind that. It has no CONNACK yet.
    pub async fn admit(
        &self,
        stream: TcpStream,
        permit: &mut HandshakePermit,
    ) -> Result<(Box<dyn ClientStream>, BytesMut, AdmittedClient), RefusedConnection> {
        let deadline = Instant::now() + LOGIN_TIMEOUT;
        let met = timeout_at(deadline, self.negotiate_tls(stream)).await.map_err(|_| ConnectRefusal::Silent)?;
        let (mut stream, mut input) = (met.map_err(|error| RefusedConnection::without_tls(&error))?, BytesMut::new());
        let read =
            timeout_at(deadline, read_connect(&mut stream, &mut input)).await.unwrap_or(Err(ConnectRefusal::Silent));
        let known = match read {
            Ok(connect) => {
                let origin = LoginOrigin { client: permit.client(), is_known: permit.is_known() };
                // While its password waits to be verified, it has a place in that queue, and needs no permit.
                permit.release();
                let (user, client_id) =
                    (connect.login.as_ref().map(|login| shown(&login.username)), shown(&connect.client_id));
                let is_user = connect.login.as_ref().is_some_and(|login| self.users.has(&login.username));
                let authenticated = timeout_at(deadline, self.authenticate(connect, origin)).await;
                permit.reacquire();
                authenticated
                    .unwrap_or_else(|_| Err(ConnectRefusal::Busy.into()))
                    .map_err(|refused| RefusedConnection { is_user, user, client_id: Some(client_id), ..refused })
            }
            Err(refusal) => Err(refusal.into()),
        };
        match known {
            Ok(client) => Ok((stream, input, client)),
            Err(refused) => {
                refused.refusal.send(stream).await;
                Err(refused)
            }
        }
    }

    /// Passwords and keys do not leave a machine unencrypted if they need not; connections within it may be.
    async fn negotiate_tls(&self, stream: TcpStream) -> io::Result<Box<dyn ClientStream>> {
        stream.set_nodelay(true)?;
        let Some(tls) = &self.tls else { return Ok(Box::new(stream)) };
        let mut first = [0];
        stream.peek(&mut first).await?;
        match first[0] {
            TLS_RECORD => Ok(Box::new(tls.accept(stream).await?)),
            _ if is_near(stream.peer_addr()?.ip(), stream.local_addr()?.ip()) => Ok(Box::new(stream)),
            _ => Err(io::ErrorKind::PermissionDenied.into()),
        }
    }

    async fn authenticate(&self, connect: Connect, origin: LoginOrigin) -> Result<AdmittedClient, RefusedConnection> {
        let Connect { keep_alive: seconds, client_id, clean_session, last_will, login, .. } = connect;
        let (user, account) = self.users.admit(login, origin).await.map_err(|denied| match denied {
            Denied::NoLogin => RefusedConnection {
                cause: "it gives no user and password".into(),
                ..RefusedConnection::from(ConnectRefusal::Password)
            },
            Denied::NoUser => {
                let cause = "mqtt_listen.users has no user of this name".into();
                RefusedConnection { cause, ..RefusedConnection::from(ConnectRefusal::Password) }
            }
            Denied::Wrong => ConnectRefusal::Password.into(),
            Denied::TooOften => ConnectRefusal::Guesses.into(),
            Denied::Crowded => ConnectRefusal::Full.into(),
        })?;
        let id = match client_id.as_str() {
            "" if clean_session => user.new_id(),
            id if id.is_empty() || id.len() > ID_MAX || id.contains(char::is_control) => {
                return Err(ConnectRefusal::ClientId.into());
            }
            id => id.to_owned(),
        };
        let name = user.client(&id).ok_or_else(|| RefusedConnection {
            cause: "a worker's client id begins with its user name: that has to be its host name".into(),
            ..RefusedConnection::from(ConnectRefusal::ClientId)
        })?;
        let (access, user) = (user.access(), user.into_name());
        let will = last_will.map(PublishedMessage::from);
        if will.as_ref().is_some_and(|will| !is_topic(&will.topic) || !access.can_publish(&will.topic)) {
            return Err(ConnectRefusal::Will.into());
        }
        // The connections of this broker itself are not lost as long as it runs.
        let keep_alive = (seconds > 0 && !account.is_own).then(|| Duration::from_secs(seconds.into()).mul_f32(1.5));
        Ok(AdmittedClient { name, access, account, user, will, keep_alive })
    }
}

impl ConnectRefusal {
    /// Sends the CONNACK, and waits until it was read: unread input here would make the system drop it on the way.
    pub async fn send(self, mut stream: Box<dyn ClientStream>) {
        let Some(code) = self.code() else { return };
        let _ = timeout(REFUSAL_TIMEOUT, async {
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

/// As much of a stranger's text as the log shows.
fn shown(text: &str) -> String {
    text.chars().take(SHOWN_MAX).collect()
}

async fn read_connect(stream: &mut (impl AsyncRead + Unpin), input: &mut BytesMut) -> Result<Connect, ConnectRefusal> {
    loop {
        match mqttbytes::check(input.iter(), CONNECT_MAX) {
            Ok(header) => return parse(input, header.frame_length()),
            Err(mqttbytes::Error::InsufficientBytes(_)) => {}
            Err(_) => return Err(ConnectRefusal::Protocol),
        }
        input.reserve(1024);
        if stream.read_buf(input).await.unwrap_or(0) == 0 {
            return Err(ConnectRefusal::Protocol);
        }
    }
}

fn parse(input: &mut BytesMut, length: usize) -> Result<Connect, ConnectRefusal> {
    match level(&input[..length]) {
        Some(PROTOCOL_LEVEL) => {}
        Some(_) => return Err(ConnectRefusal::Version),
        None => return Err(ConnectRefusal::Protocol),
    }
    match Packet::read(input, CONNECT_MAX) {
        Ok(Packet::Connect(connect)) => Ok(connect),
        _ => Err(ConnectRefusal::Protocol),
    }
}

/// The protocol's version in a CONNECT: the fields behind it differ between versions.
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
            assert_eq!(read(&connect).err(), Some(ConnectRefusal::Version));
        }
        assert_eq!(read(b"\x10\x0c\0\x06MQIsdp\x03\x02\0\x3c").err(), Some(ConnectRefusal::Version));
        for bytes in [&b"\xc0\0"[..], b"\x10\0", b"\x10\x04\0\x04MQ", b"GET / HTTP/1.1\r\n", b"\x10\x07\0\x04MQTT\x04"]
        {
            assert_eq!(read(bytes).err(), Some(ConnectRefusal::Protocol), "{bytes:?}");
        }
    }

    #[test]
    fn a_client_on_another_machine_is_not_near() {
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
