//! The files that a config names, and whether they can be read, as far as that can be checked before the program
//! starts. The password's file is not among them: it is read with the config.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read as _};
use std::path::{Path, PathBuf};

use super::problem::UNREAD;
use super::{Config, ConfigProblem, Https, MqttListen};
use crate::tls;

/// The keys that name files.
pub(super) const KEYS: [&str; 15] = [
    "broker_listen.tls.cert_file",
    "broker_listen.tls.key_file",
    "mqtt_listen.tls.cert_file",
    "mqtt_listen.tls.key_file",
    "mqtt.ca_file",
    "mqtt.cert_file",
    "mqtt.key_file",
    "blacklist_file",
    "allowlist.file",
    "key_lists.deny_dir",
    "key_lists.allow_dir",
    "key_lists.trusted_dir",
    "registry.password_file",
    "storage_password_file",
    "tenants.tokens_file",
];
/// The name of the config file itself in the list of files to read.
pub const CONFIG_FILE: &str = "config";
/// The key that names the file of the password of the MQTT server.
pub const PASSWORD_FILE: &str = "mqtt.password_file";
/// The directory of a unit's credentials, which exists only while it runs.
const CREDENTIALS: &str = "/run/credentials/";

/// The program that does not start without a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NeededBy {
    /// The broker.
    Broker,
    /// The broker and the worker.
    Both,
    /// None: reading is repeated until the file exists.
    None,
}

/// A file or directory that a program reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileToRead {
    /// The key of the config that names it, or [`CONFIG_FILE`].
    pub key: &'static str,
    /// The program that does not start without it.
    pub needed_by: NeededBy,
    /// Where it is.
    pub path: PathBuf,
}

/// A file or directory that the config names and that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnreadableFile {
    /// The program that does not start without it.
    pub needed_by: NeededBy,
    /// The problem, at its key.
    pub problem: ConfigProblem,
}

impl FileToRead {
    /// Whether it is a directory.
    #[must_use]
    pub fn is_directory(&self) -> bool {
        ExpectedContent::of(self.key) == ExpectedContent::Directory
    }
}

impl Config {
    /// The files and directories that the config names, that a program reads, and that this process cannot read now.
    #[must_use]
    pub fn unreadable_files(&self) -> Vec<UnreadableFile> {
        let unreadable = |(key, needed_by, path): (&'static str, NeededBy, Option<&Path>)| {
            let path = path?;
            let problem = format!("{}: {}", path.display(), trouble(path, ExpectedContent::of(key))?);
            Some(UnreadableFile { needed_by, problem: self.source.problem(key, problem) })
        };
        self.named_files().into_iter().filter_map(unreadable).collect()
    }

    /// The config file itself, unless the command line named it, the password's file, and all files that the config names.
    #[must_use]
    pub fn files_to_read(&self) -> Vec<FileToRead> {
        let own = self.source.chosen_file();
        let password = self.source.text("/mqtt/password_file").map(Path::new);
        let first = [(CONFIG_FILE, NeededBy::Both, own), (PASSWORD_FILE, NeededBy::Both, password)];
        let named = first.into_iter().chain(self.named_files());
        let file = |(key, needed_by, path): (&'static str, NeededBy, Option<&Path>)| {
            Some(FileToRead { key, needed_by, path: path?.to_owned() })
        };
        named.filter_map(file).collect()
    }

    /// The problem of such a file.
    #[must_use]
    pub fn problem_of(&self, FileToRead { key, needed_by, path }: &FileToRead, problem: &str) -> UnreadableFile {
        let problem = self.source.problem(key, format!("{}: {problem}", path.display()));
        UnreadableFile { needed_by: *needed_by, problem }
    }

    fn named_files(&self) -> [(&'static str, NeededBy, Option<&Path>); KEYS.len()] {
        let https = self.https.as_ref().map(|Https { cert_file, key_file, .. }| [&**cert_file, key_file]);
        let server = self.mqtt_listen.as_ref().and_then(|MqttListen { tls, .. }| tls.as_ref());
        let server = server.map(|(certificate, key)| [&**certificate, key]);
        let session = self.mqtt.tls.as_ref();
        let ca = session.and_then(|tls| tls.ca_file.as_deref());
        let own = session.and_then(|tls| tls.own.as_ref()).map(|(certificate, key)| [&**certificate, key]);
        let database = self.registry.as_ref().map(|_| &self.storage).filter(|storage| storage.url.is_some());
        let (lists, allow) = (&self.key_lists, self.key_lists.allow.as_ref());
        let [certificate, key, server_certificate, server_key, ca_file, own_certificate, own_key, rest @ ..] = KEYS;
        let [deny_file, allow_file, deny_dir, allow_dir, trusted_dir, rest @ ..] = rest;
        let [registry_password, storage_password, tokens] = rest;
        let tokens_file = self.tenants.as_ref().and_then(|tenants| tenants.tokens_file.as_deref());
        [
            (certificate, NeededBy::Broker, https.map(|[certificate, _]| certificate)),
            (key, NeededBy::Broker, https.map(|[_, key]| key)),
            (server_certificate, NeededBy::Broker, server.map(|[certificate, _]| certificate)),
            (server_key, NeededBy::Broker, server.map(|[_, key]| key)),
            (ca_file, NeededBy::Both, ca),
            (own_certificate, NeededBy::Both, own.map(|[certificate, _]| certificate)),
            (own_key, NeededBy::Both, own.map(|[_, key]| key)),
            (deny_file, NeededBy::None, lists.deny_file.as_deref()),
            (allow_file, NeededBy::None, allow.and_then(|allow| allow.file.as_deref())),
            (deny_dir, NeededBy::None, lists.deny_dir.as_deref()),
            (allow_dir, NeededBy::None, allow.and_then(|allow| allow.dir.as_deref())),
            (trusted_dir, NeededBy::None, lists.trusted_dir.as_deref()),
            (registry_password, NeededBy::Broker, self.registry.as_ref().map(|registry| &*registry.password_file)),
            (storage_password, NeededBy::Broker, database.and_then(|storage| storage.password_file.as_deref())),
            (tokens, NeededBy::Broker, tokens_file),
        ]
    }
}

/// The expected kind of file at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ExpectedContent {
    Certificates,
    PrivateKey,
    Text,
    Directory,
}

impl ExpectedContent {
    /// By the name of the key.
    fn of(key: &str) -> Self {
        match key.rsplit('.').next() {
            Some("cert_file" | "ca_file") => Self::Certificates,
            Some("key_file") => Self::PrivateKey,
            Some("deny_dir" | "allow_dir" | "trusted_dir") => Self::Directory,
            _ => Self::Text,
        }
    }
}

/// Why it cannot be used; none if it can, or if that cannot be checked while its unit is not running.
fn trouble(path: &Path, content: ExpectedContent) -> Option<String> {
    match read(path, content) {
        Ok(()) => match content {
            ExpectedContent::Certificates => {
                tls::certificates("", path).err().map(|_| "has no certificate: PEM is expected".to_owned())
            }
            ExpectedContent::PrivateKey => {
                tls::private_key("", path).err().map(|_| "has no private key: PEM is expected".to_owned())
            }
            ExpectedContent::Text | ExpectedContent::Directory => None,
        },
        Err(error) if error.kind() == ErrorKind::NotFound => {
            (!path.starts_with(CREDENTIALS)).then(|| "does not exist".to_owned())
        }
        Err(error) if error.kind() == ErrorKind::IsADirectory => Some("is a directory: a file is expected".to_owned()),
        Err(error) if error.kind() == ErrorKind::NotADirectory => {
            Some("is no directory: a directory is expected".to_owned())
        }
        Err(error) => Some(format!("{UNREAD}: {error}")),
    }
}

/// Reading others than files and directories, such as a pipe, could block the program.
fn read(path: &Path, content: ExpectedContent) -> io::Result<()> {
    let metadata = fs::metadata(path)?;
    match content {
        ExpectedContent::Directory => fs::read_dir(path).map(drop),
        ExpectedContent::Certificates | ExpectedContent::PrivateKey | ExpectedContent::Text if metadata.is_dir() => {
            Err(ErrorKind::IsADirectory.into())
        }
        ExpectedContent::Certificates | ExpectedContent::PrivateKey | ExpectedContent::Text if metadata.is_file() => {
            File::open(path)?.read(&mut [0]).map(drop)
        }
        ExpectedContent::Certificates | ExpectedContent::PrivateKey | ExpectedContent::Text => Ok(()),
    }
}
