//! Why there is no connection, in words for the operator: the cause, and the key of the config that may have to be
//! changed. No IO.

use std::io::{self, ErrorKind};

use rumqttc::{ConnectReturnCode, ConnectionError, StateError, TlsError};
use tokio_rustls::rustls::{self, AlertDescription, CertificateError};

use crate::config::{Mqtt, MqttAddress};

/// The setting or the server that has to change before a connection is possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The user name or the password.
    Password,
    /// The client id, which the user may not have.
    ClientId,
    /// The certificates, or which of the ports has TLS.
    Tls,
    /// TLS is off, and the server may require it.
    NoTls,
    /// The server is full, or rejects logins for now after too many wrong passwords.
    Busy,
    /// The server, or its name in the config.
    Server,
}

/// The parameters of a connection that may cause a failure.
#[derive(Debug, Clone)]
pub(super) struct Attempt {
    id: String,
    username: Option<String>,
    has_tls: bool,
    has_ca_file: bool,
    /// The server, unless it is the embedded one, which needs no TLS on this machine.
    server: Option<(String, u16)>,
    /// Whether the server uses TLS there, if that was probed.
    server_speaks_tls: Option<bool>,
}

impl Attempt {
    pub(super) fn new(config: &Mqtt, id: &str) -> Self {
        Self {
            id: id.to_owned(),
            username: config.credentials.as_ref().map(|credentials| credentials.username.clone()),
            has_tls: config.tls.is_some(),
            has_ca_file: config.tls.as_ref().is_some_and(|tls| tls.ca_file.is_some()),
            server: match &config.server {
                MqttAddress::External { host, port } => Some((host.clone(), *port)),
                MqttAddress::Embedded(_) | MqttAddress::Own(_) => None,
            },
            server_speaks_tls: None,
        }
    }

    /// Host and port of the server if it ended the connection like one that requires TLS, and was not probed yet.
    pub(super) fn may_need_tls(&self, error: &ConnectionError, accepted: bool) -> Option<(String, u16)> {
        let may_be = self.server_speaks_tls.is_none() && self.fault(error, accepted) == Fault::NoTls;
        self.server.clone().filter(|_| may_be)
    }

    /// Sets whether the server uses TLS.
    pub(super) fn server_speaks_tls(&mut self, does_it: bool) {
        self.server_speaks_tls = Some(does_it);
    }

    /// Whether the connection, which the server had `accepted` or not, ended because it lacks TLS.
    pub(super) fn lacks_tls(&self, accepted: bool) -> bool {
        !accepted && !self.has_tls && self.server_speaks_tls == Some(true)
    }

    /// The server accepted the connection: the next failure has another cause.
    pub(super) fn connected(&mut self) {
        self.server_speaks_tls = None;
    }

    /// One line about a connection that was lost, or that the server had not `accepted`. It contains no number that
    /// changes with each attempt, so that it can be logged once.
    pub(super) fn describe(&self, error: &ConnectionError, accepted: bool) -> String {
        match error {
            ConnectionError::ConnectionRefused(
                ConnectReturnCode::BadUserNamePassword | ConnectReturnCode::NotAuthorized,
            ) => "the server refuses the user name or password".into(),
            ConnectionError::ConnectionRefused(ConnectReturnCode::BadClientId) => self.bad_client_id(),
            ConnectionError::ConnectionRefused(ConnectReturnCode::ServiceUnavailable) => {
                "the server takes no connection for now: it is full, or there were too many wrong passwords".into()
            }
            ConnectionError::ConnectionRefused(code) => format!("the server refuses the connection: {code:?}"),
            ConnectionError::NetworkTimeout | ConnectionError::FlushTimeout => "the server does not answer".into(),
            ConnectionError::Io(error)
            | ConnectionError::MqttState(
                StateError::Io(error) | StateError::Deserialization(rumqttc::mqttbytes::Error::Io(error)),
            ) => self.io(error, accepted),
            ConnectionError::Tls(TlsError::Io(error)) => self.tls(error),
            ConnectionError::Tls(error) => format!("TLS: {error}"),
            ConnectionError::MqttState(StateError::ConnectionAborted) => self.closed(accepted),
            ConnectionError::MqttState(StateError::AwaitPingResp) => "the server does not answer pings".into(),
            ConnectionError::MqttState(StateError::Deserialization(_)) | ConnectionError::NotConnAck(_) => {
                "the server does not speak MQTT 3.1.1".into()
            }
            ConnectionError::MqttState(error) => error.to_string(),
            ConnectionError::RequestsDone => "the session has ended".into(),
        }
    }

    /// The setting or the server that may have to change.
    pub(super) fn fault(&self, error: &ConnectionError, accepted: bool) -> Fault {
        match error {
            ConnectionError::ConnectionRefused(
                ConnectReturnCode::BadUserNamePassword | ConnectReturnCode::NotAuthorized,
            ) => Fault::Password,
            ConnectionError::ConnectionRefused(ConnectReturnCode::BadClientId) => Fault::ClientId,
            ConnectionError::ConnectionRefused(ConnectReturnCode::ServiceUnavailable) => Fault::Busy,
            ConnectionError::Tls(_) => Fault::Tls,
            ConnectionError::Io(error)
            | ConnectionError::MqttState(
                StateError::Io(error) | StateError::Deserialization(rumqttc::mqttbytes::Error::Io(error)),
            ) => match of_tls(error) {
                Some(_) => Fault::Tls,
                None if is_end(error) => self.fault_of_end(accepted),
                None => Fault::Server,
            },
            ConnectionError::MqttState(StateError::ConnectionAborted) => self.fault_of_end(accepted),
            ConnectionError::ConnectionRefused(_)
            | ConnectionError::NetworkTimeout
            | ConnectionError::FlushTimeout
            | ConnectionError::MqttState(_)
            | ConnectionError::NotConnAck(_)
            | ConnectionError::RequestsDone => Fault::Server,
        }
    }

    fn fault_of_end(&self, accepted: bool) -> Fault {
        if accepted || self.has_tls { Fault::Server } else { Fault::NoTls }
    }

    fn bad_client_id(&self) -> String {
        let Self { id, username, .. } = self;
        match username {
            Some(user) => format!(
                "the server refuses the client id {id} of user {user}: where each worker is a user, mqtt.username must be \
                 the host name"
            ),
            None => format!("the server refuses the client id {id}"),
        }
    }

    fn io(&self, error: &io::Error, accepted: bool) -> String {
        match of_tls(error) {
            Some(tls) => self.tls_error(tls),
            None if is_end(error) => self.closed(accepted),
            None => error.to_string(),
        }
    }

    fn closed(&self, accepted: bool) -> String {
        match (accepted, self.has_tls) {
            (true, _) => "the server closed the connection".into(),
            (false, true) => "the server closed the connection without an answer".into(),
            (false, false) => match self.server_speaks_tls {
                Some(true) => "the server speaks TLS on this port: set mqtt.tls to true".into(),
                Some(false) => "the server closed the connection without an answer".into(),
                None => "the server closed the connection without an answer: does it want TLS (mqtt.tls)?".into(),
            },
        }
    }

    /// An error of the handshake.
    fn tls(&self, error: &io::Error) -> String {
        match of_tls(error) {
            Some(tls) => self.tls_error(tls),
            None if is_end(error) => {
                "TLS: the server closed the connection during the handshake: is it the port for TLS \
                                      (mqtt.broker_port)?"
                    .into()
            }
            None => format!("TLS: {error}"),
        }
    }

    fn tls_error(&self, tls: &rustls::Error) -> String {
        let text = if let rustls::Error::InvalidCertificate(error) = tls {
            self.certificate(error)
        } else if let rustls::Error::InvalidMessage(_) = tls {
            Some("the server does not speak TLS on this port (mqtt.broker_port)")
        } else if let rustls::Error::AlertReceived(AlertDescription::CertificateRequired) = tls {
            Some("the server wants a certificate (mqtt.cert_file, mqtt.key_file) (CertificateRequired)")
        } else {
            None
        };
        text.map_or_else(|| format!("TLS: {tls}"), |text| format!("TLS: {text}"))
    }

    /// The error of the server's certificate, without dates and names.
    fn certificate(&self, error: &CertificateError) -> Option<&'static str> {
        let (expired, early) = (
            matches!(error, CertificateError::Expired | CertificateError::ExpiredContext { .. }),
            matches!(error, CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. }),
        );
        match () {
            () if *error == CertificateError::UnknownIssuer && self.has_ca_file => {
                Some("mqtt.ca_file names no certificate by which the server's is signed (UnknownIssuer)")
            }
            () if *error == CertificateError::BadSignature && self.has_ca_file => Some(
                "mqtt.ca_file names a certificate of the same name as the one that signed the server's, and not that one \
                 (BadSignature)",
            ),
            () if *error == CertificateError::UnknownIssuer => Some(
                "no certificate of this system signed the server's; mqtt.ca_file can name the one that did (UnknownIssuer)",
            ),
            () if error.to_string().contains("CaUsedAsEndEntity") => {
                Some("the server's certificate is that of a CA, which a server must not have (CaUsedAsEndEntity)")
            }
            () if expired => Some("the server's certificate has expired, or the clock of this machine is ahead"),
            () if early => Some("the server's certificate is not valid yet, or the clock of this machine is behind"),
            () => None,
        }
    }
}

fn of_tls(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref().and_then(|error| error.downcast_ref())
}

/// Whether the other end closed the connection.
fn is_end(error: &io::Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | ConnectionReset | ConnectionAborted | BrokenPipe)
}

/// The first level of a topic or filter that contains a dot.
pub(super) fn dotted(topic: &str) -> Option<&str> {
    topic.split('/').find(|level| level.contains('.'))
}

/// A possible cause if the server rejects this topic, filter or name; empty if it has no dot.
pub(super) fn dot_hint(topic: &str) -> String {
    let hint = |name| format!("; it may be one that takes no name with a dot, as NATS before 2.10, and {name} has one");
    dotted(topic).map(hint).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt(has_tls: bool, has_ca_file: bool) -> Attempt {
        Attempt {
            id: "gw1".into(),
            username: Some("gw2".into()),
            has_tls,
            has_ca_file,
            server: Some(("mqtt".into(), 1883)),
            server_speaks_tls: None,
        }
    }

    #[test]
    fn each_fault_is_distinguished_from_the_others() {
        let refused = |code| ConnectionError::ConnectionRefused(code);
        let tls =
            ConnectionError::Tls(TlsError::Io(io::Error::other(rustls::Error::from(CertificateError::UnknownIssuer))));
        let end = || ConnectionError::Io(ErrorKind::ConnectionReset.into());
        for (has_tls, error, accepted, fault) in [
            (false, refused(ConnectReturnCode::BadUserNamePassword), false, Fault::Password),
            (false, refused(ConnectReturnCode::NotAuthorized), false, Fault::Password),
            (false, refused(ConnectReturnCode::BadClientId), false, Fault::ClientId),
            (false, refused(ConnectReturnCode::ServiceUnavailable), false, Fault::Busy),
            (true, tls, false, Fault::Tls),
            (false, end(), false, Fault::NoTls),
            (true, end(), false, Fault::Server),
            (false, end(), true, Fault::Server),
            (false, ConnectionError::MqttState(StateError::ConnectionAborted), false, Fault::NoTls),
            (false, ConnectionError::Io(ErrorKind::ConnectionRefused.into()), false, Fault::Server),
            (false, ConnectionError::NetworkTimeout, false, Fault::Server),
        ] {
            assert_eq!(attempt(has_tls, false).fault(&error, accepted), fault, "{error:?}");
        }
    }

    #[test]
    fn each_cause_has_the_setting_to_change() {
        let io = |kind: ErrorKind| ConnectionError::Io(kind.into());
        let tls = |error: rustls::Error| ConnectionError::Tls(TlsError::Io(io::Error::other(error)));
        let unknown = || tls(CertificateError::UnknownIssuer.into());
        let required = rustls::Error::AlertReceived(AlertDescription::CertificateRequired);
        let later = StateError::Deserialization(rumqttc::mqttbytes::Error::Io(io::Error::other(required)));
        for (attempt, error, said) in [
            (attempt(true, true), ConnectionError::MqttState(later), "mqtt.cert_file"),
            (attempt(false, false), io(ErrorKind::ConnectionReset), "mqtt.tls"),
            (attempt(false, false), io(ErrorKind::UnexpectedEof), "mqtt.tls"),
            (attempt(true, false), unknown(), "mqtt.ca_file can name"),
            (attempt(true, true), unknown(), "mqtt.ca_file names no certificate"),
            (
                attempt(true, true),
                tls(CertificateError::BadSignature.into()),
                "mqtt.ca_file names a certificate of the same name",
            ),
            (attempt(true, true), tls(CertificateError::Expired.into()), "clock"),
            (attempt(true, false), tls(rustls::InvalidMessage::InvalidContentType.into()), "mqtt.broker_port"),
            (attempt(false, false), ConnectionError::MqttState(StateError::ConnectionAborted), "server closed"),
            (
                attempt(false, false),
                ConnectionError::ConnectionRefused(ConnectReturnCode::BadClientId),
                "the client id gw1 of user gw2",
            ),
        ] {
            let text = attempt.describe(&error, false);
            assert!(text.contains(said) && !text.contains('\n'), "{error:?}: {text}");
        }
        let end = io(ErrorKind::ConnectionReset);
        let mut plain = attempt(false, false);
        assert_eq!(plain.may_need_tls(&end, false), Some(("mqtt".into(), 1883)));
        assert_eq!(plain.may_need_tls(&end, true), None);
        for (does_it, said) in
            [(true, "the server speaks TLS on this port: set mqtt.tls"), (false, "without an answer")]
        {
            plain.server_speaks_tls(does_it);
            assert!(plain.describe(&end, false).contains(said), "{}", plain.describe(&end, false));
            assert_eq!((plain.lacks_tls(false), plain.lacks_tls(true)), (does_it, false));
            assert_eq!(plain.may_need_tls(&end, false), None, "it is looked for once");
        }
        let lost = attempt(false, false).describe(&io(ErrorKind::ConnectionReset), true);
        assert_eq!(lost, "the server closed the connection");
    }
}
