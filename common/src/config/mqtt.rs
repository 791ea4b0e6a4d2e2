//! The session with the MQTT server: `mqtt`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path as FilePath, PathBuf};
use std::time::Duration;
use std::{fs, io};

use serde::{Deserialize, Serialize};

use super::certificate::pair;
use super::diagnostics::{Diagnostics, Path};
use super::mqtt_listen::{self, MqttListen};
use super::problem::{NO_PASSWORD, UNREAD};
use super::value::{File, Flag, Host, Keepalive, Port, Secret, Text, is_placeholder, port};

/// The longest password.
const PASSWORD_FILE_MAX: u64 = 4096;

/// The session with the MQTT server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mqtt {
    /// The server.
    pub server: MqttAddress,
    /// The user; none for a server that requires no login.
    pub credentials: Option<Credentials>,
    /// The keep-alive interval; whole seconds, 1 to 65535.
    pub keepalive: Duration,
    /// The settings of TLS; none if the connection is not encrypted.
    pub tls: Option<Tls>,
}

/// The settings of TLS.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tls {
    /// The CA certificates, as PEM, by which the server's must be signed; none for the system's.
    pub ca_file: Option<PathBuf>,
    /// The client certificate and its private key, as PEM, for a server that requires one.
    pub own: Option<(PathBuf, PathBuf)>,
}

/// The MQTT server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MqttAddress {
    /// The one inside the broker, which a program on the same machine reaches at this address.
    Embedded(SocketAddr),
    /// The same for the broker itself: on a separate port, which is not logged.
    Own(SocketAddr),
    /// Another MQTT server.
    External {
        /// Its name or address, without brackets.
        host: String,
        /// Its port.
        port: u16,
    },
}

/// A user of the MQTT server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The user's name.
    pub username: String,
    /// The user's password.
    pub password: Secret,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct RawMqtt {
    pub broker_url: Option<Host>,
    pub broker_port: Option<Port>,
    pub username: Option<Text>,
    pub password: Option<Text>,
    pub password_file: Option<File>,
    pub keepalive: Option<Keepalive>,
    pub tls: Option<Flag>,
    pub ca_file: Option<File>,
    pub cert_file: Option<File>,
    pub key_file: Option<File>,
}

impl RawMqtt {
    /// Reads the password from `file`, unless the config has one.
    pub fn offer_password_file(&mut self, file: Option<&str>) {
        if self.password.is_none() && self.password_file.is_none() {
            self.password_file = file.map(|file| File(file.to_owned()));
        }
    }

    /// `own` is the server inside the broker, if no other is named; `is_listen_set` is whether the file has its
    /// section.
    pub fn check(self, own: Option<&MqttListen>, is_listen_set: bool, diagnostics: &mut Diagnostics) -> Mqtt {
        let is_encrypted = self.tls.is_some_and(|tls| tls.0);
        let is_external = own.is_none();
        let (another, none, plain) =
            ("mqtt.broker_url names another server", "mqtt.broker_url is not set", "mqtt.tls is not true");
        let unused = [
            ("mqtt.broker_port", !is_external && port(self.broker_port.as_ref(), 1883) != 1883, none),
            ("mqtt.tls", !is_external && is_encrypted, none),
            ("mqtt.ca_file", !is_encrypted && self.ca_file.is_some(), plain),
            ("mqtt.cert_file", !is_encrypted && self.cert_file.is_some(), plain),
            ("mqtt.key_file", !is_encrypted && self.key_file.is_some(), plain),
            ("mqtt_listen", is_external && is_listen_set, another),
        ];
        for (path, _, why) in unused.iter().filter(|(_, is_unused, _)| *is_unused) {
            diagnostics.warn(&Path::of(path), &format!("is not used, as {why}"));
        }
        let own_files = pair("mqtt", self.cert_file, self.key_file, diagnostics);
        let tls = Tls { ca_file: self.ca_file.map(|file| file.0.into()), own: own_files };
        let external = |host: Host| MqttAddress::External { host: host.0, port: port(self.broker_port.as_ref(), 1883) };
        Mqtt {
            credentials: credentials(self.username, self.password, self.password_file, diagnostics),
            keepalive: Duration::from_secs(self.keepalive.map_or(5, |Keepalive(seconds)| keepalive(seconds))),
            tls: (is_encrypted && is_external).then_some(tls),
            server: match (self.broker_url, own) {
                (Some(host), _) => external(host),
                (None, own) => MqttAddress::Embedded(reachable(own.map_or(mqtt_listen::DEFAULT, |own| own.address))),
            },
        }
    }
}

/// rumqttc needs a keep-alive interval; the longest one stands for none.
fn keepalive(seconds: u16) -> u64 {
    if seconds == 0 { u16::MAX.into() } else { seconds.into() }
}

/// The address by which a program on the same machine reaches a server that listens on `address`.
fn reachable(address: SocketAddr) -> SocketAddr {
    let loopback: IpAddr = if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    SocketAddr::new(if address.ip().is_unspecified() { loopback } else { address.ip() }, address.port())
}

/// A user has both, as in the original.
fn credentials(
    username: Option<Text>,
    password: Option<Text>,
    file: Option<File>,
    diagnostics: &mut Diagnostics,
) -> Option<Credentials> {
    let given = |text: Option<Text>| text.map(|text| text.0).filter(|text| !text.is_empty());
    let key = if file.is_some() { "mqtt.password_file" } else { "mqtt.password" };
    let password = match (given(password), file) {
        (Some(_), Some(_)) => {
            diagnostics.error(&Path::of(key), "must not be set beside mqtt.password");
            return None;
        }
        (None, Some(file)) => match password_in(FilePath::new(&file.0)) {
            Ok(password) => Some(password),
            Err(problem) => {
                diagnostics.error(&Path::of(key), &format!("{}: {problem}", file.0));
                return None;
            }
        },
        (password, None) => password,
    };
    if password.as_deref().is_some_and(is_placeholder) {
        diagnostics.error(&Path::of(key), "must be the password of mqtt.username, not that of an example");
        return None;
    }
    match (given(username), password) {
        (Some(username), Some(password)) => Some(Credentials { username, password: Secret::new(password) }),
        (None, None) => None,
        (Some(_), None) => {
            diagnostics.warn(&Path::of("mqtt.username"), "is not used, as mqtt.password is not set");
            None
        }
        (None, Some(_)) => {
            diagnostics.warn(&Path::of(key), "is not used, as mqtt.username is not set");
            None
        }
    }
}

/// The password in a file: its only line. The error does not name the file.
pub fn password_in(file: &FilePath) -> Result<String, String> {
    let unreadable = |error: io::Error| format!("{UNREAD}: {error}");
    let metadata = fs::metadata(file).map_err(unreadable)?;
    // Reading another kind of file, such as a pipe, could block the program.
    if !metadata.is_file() || metadata.len() > PASSWORD_FILE_MAX {
        return Err(format!("must be a file of at most {PASSWORD_FILE_MAX} bytes"));
    }
    let text = fs::read_to_string(file).map_err(unreadable)?;
    let password = text.strip_suffix('\n').unwrap_or(&text);
    let password = password.strip_suffix('\r').unwrap_or(password);
    if password.is_empty() || password.contains(['\n', '\r']) {
        return Err(NO_PASSWORD.to_owned());
    }
    Ok(password.to_owned())
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use crate::Config;

    const CONFIG: &str = "domains: [ffmuc_welt]\ndomain_prefixes: [ffmuc_]\n";

    /// The password in a file with this content, or the error.
    fn password(content: &[u8]) -> Result<String, String> {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("secret");
        std::fs::write(&file, content).unwrap();
        let yaml = format!("{CONFIG}mqtt:\n  username: gw1\n  password_file: {}\n", file.display());
        let config = Config::parse("test.yaml", &yaml, "gw1").map_err(|error| error.to_string())?;
        assert_eq!(config.warnings, []);
        Ok(config.mqtt.credentials.unwrap().password.expose().to_owned())
    }

    #[test]
    fn a_password_file_has_the_password_in_its_only_line() {
        for content in ["se cret", "se cret\n", "se cret\r\n"] {
            assert_eq!(password(content.as_bytes()).as_deref(), Ok("se cret"), "{content:?}");
        }
        for content in ["", "\n", "one\ntwo\n", "one\n\n"] {
            let error = password(content.as_bytes()).unwrap_err();
            assert!(error.starts_with("test.yaml:5: mqtt.password_file: /"), "{error}");
            assert!(error.ends_with("secret: must have one line, the password"), "{error}");
        }
        assert!(password(b"\xff").unwrap_err().contains("cannot be read: "));
        assert!(password(&[b'a'; 5000]).unwrap_err().contains("a file of at most 4096 bytes"));
    }

    #[test]
    fn a_password_file_that_cannot_be_used_is_an_error_that_names_its_key() {
        let cases = [
            ("/nonexistent/secret", "mqtt.password_file: /nonexistent/secret: cannot be read: No such file"),
            ("/dev/zero", "mqtt.password_file: /dev/zero: must be a file of at most"),
            ("secret", "mqtt.password_file: must be the absolute path of a file, not \"secret\""),
            ("/dev/null\n  password: x", "mqtt.password_file: must not be set beside mqtt.password"),
        ];
        for (file, problem) in cases {
            let yaml = format!("{CONFIG}mqtt:\n  username: gw1\n  password_file: {file}\n");
            let error = Config::parse("test.yaml", &yaml, "gw1").unwrap_err().to_string();
            assert!(error.starts_with(&format!("test.yaml:5: {problem}")), "{error}");
        }
    }
}
