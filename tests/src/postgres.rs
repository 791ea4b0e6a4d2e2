//! Debian's `PostgreSQL` on a free port of loopback, under its own user; it ends with the process that started it.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{OnceLock, mpsc};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User, chown};
use tempfile::TempDir;

use crate::process::Process;
use crate::proxy::{Proxy, ProxyMode};
use crate::stack::free_address;
use crate::wait_until;

/// The system user of the server, and the database user of the broker.
const USER: &str = "postgres";
/// The password of that user.
pub const PASSWORD: &str = "s3cret of the store";

/// A server.
pub struct Postgres {
    address: SocketAddr,
    dir: TempDir,
    process: Option<Process>,
}

/// A database of a server.
#[derive(Debug, Clone)]
pub struct Database {
    /// The `storage` of the broker's config.
    pub url: String,
}

impl Database {
    /// The same database behind a proxy with this behaviour, which lives as long as the second value.
    #[must_use]
    pub fn behind(&self, mode: ProxyMode) -> (Self, Proxy) {
        let (scheme_and_user, place) = self.url.split_once('@').expect("a user");
        let (address, name) = place.split_once('/').expect("a name");
        let listen = free_address();
        let proxy = Proxy::start(listen, vec![address.parse().expect("an address")], mode);
        (Self { url: format!("{scheme_and_user}@{listen}/{name}") }, proxy)
    }
}

/// A database of its own on a server that all tests of this process share.
#[must_use]
pub fn database() -> Database {
    static SERVER: OnceLock<(SocketAddr, PathBuf)> = OnceLock::new();
    static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let (address, dir) = SERVER.get_or_init(|| {
        let (send, receive) = mpsc::channel();
        // The server ends with the thread that started it.
        thread::spawn(move || {
            let server = Postgres::start();
            let _ = send.send((server.address, server.dir.path().to_owned()));
            loop {
                thread::park();
            }
        });
        receive.recv().expect("a server")
    });
    let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    create_database(*address, dir, &format!("test{number}"))
}

impl Postgres {
    /// A new server that accepts connections.
    #[must_use]
    pub fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("wgkex-postgres-").tempdir().expect("a directory");
        let user = User::from_name(USER).expect("users").expect("PostgreSQL is missing: apt-get install postgresql");
        chown(dir.path(), Some(user.uid), Some(user.gid)).expect("the directory's owner");
        make_data(dir.path());
        let mut server = Self { address: free_address(), dir, process: None };
        server.start_again();
        server
    }

    /// Starts it on the same port with the same data.
    pub fn start_again(&mut self) {
        let (dir, port) = (self.dir.path().display().to_string(), self.address.port().to_string());
        let arguments = ["-D", &format!("{dir}/data"), "-p", &port, "-k", &dir, "-h", "127.0.0.1"];
        let mut command = as_user(&program("postgres"));
        self.process = Some(Process::start("postgres", command.args(arguments)));
        wait_until("PostgreSQL answers", || {
            let process = self.process.as_mut()?;
            assert!(process.is_running(), "PostgreSQL ended: {}", process.log());
            psql(self.address, self.dir.path(), "postgres", "SELECT 1").ok()
        });
    }

    /// The process that runs.
    #[must_use]
    pub fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("a server that runs")
    }

    /// Stops all its processes, or continues them.
    pub fn freeze(&mut self, is_frozen: bool) {
        let signal = if is_frozen { Signal::SIGSTOP } else { Signal::SIGCONT };
        let server = self.process().pid();
        self.process().signal(signal);
        for child in children(server) {
            // The process may have ended meanwhile.
            let _ = kill(Pid::from_raw(child), signal);
        }
    }

    /// Ends it at once.
    pub fn kill(&mut self) {
        let _ = self.process().end_by(Signal::SIGQUIT);
    }

    /// Runs a statement in a database.
    pub fn run(&self, database: &str, sql: &str) {
        psql(self.address, self.dir.path(), database, sql).expect("a statement");
    }

    /// A new database.
    #[must_use]
    pub fn database(&self, name: &str) -> Database {
        create_database(self.address, self.dir.path(), name)
    }
}

/// Makes the files of a server. As that takes seconds, they are copied if a test has made some before.
fn make_data(dir: &Path) {
    let (data, initdb) = (dir.join("data"), program("initdb"));
    let this = std::env::current_exe().expect("the path of this program");
    let version =
        initdb.ancestors().nth(2).and_then(Path::file_name).expect("a version").to_string_lossy().into_owned();
    let known = this.with_file_name(format!("postgres-{version}.data"));
    if copy(&known, &data) {
        return;
    }
    let password = dir.join("password");
    fs::write(&password, PASSWORD).expect("a password");
    let made = as_user(&initdb)
        .args(["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync", "-U", USER])
        .arg(format!("--pwfile={}", password.display()))
        .arg("-D")
        .arg(&data)
        .output()
        .expect("initdb runs");
    assert!(made.status.success(), "{made:?}");
    let new = known.with_extension(std::process::id().to_string());
    // Another test may have made it meanwhile.
    if !copy(&data, &new) || fs::rename(&new, &known).is_err() {
        let _ = fs::remove_dir_all(&new);
    }
}

fn copy(from: &Path, to: &Path) -> bool {
    from.exists() && Command::new("cp").arg("-a").args([from, to]).status().expect("cp runs").success()
}

/// The processes that a process has started (proc(5), `/proc/PID/stat`).
fn children(parent: u32) -> Vec<i32> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_child = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent_of = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1));
        parent_of.is_some_and(|of| of == parent.to_string())
    };
    pids.filter(is_child).collect()
}

fn create_database(address: SocketAddr, dir: &Path, name: &str) -> Database {
    psql(address, dir, "postgres", &format!("CREATE DATABASE {name}")).expect("a database");
    Database { url: format!("postgres://{USER}@{address}/{name}") }
}

fn psql(address: SocketAddr, dir: &Path, database: &str, sql: &str) -> Result<(), String> {
    let mut command = as_user(&program("psql"));
    let command = command.env("PGPASSWORD", PASSWORD).current_dir(dir);
    let output = command
        .args(["-h", "127.0.0.1", "-p", &address.port().to_string(), "-U", USER, "-q", "-c", sql, database])
        .output()
        .expect("psql runs");
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// A command of the server's user, which dies with the thread that started it.
fn as_user(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid", USER, "--regid", USER, "--clear-groups", "--pdeathsig", "QUIT", "--"]);
    command.arg(program).current_dir("/");
    command
}

/// The path of a program in Debian's newest version.
fn program(name: &str) -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let program = versions.map(|version| version.path().join("bin").join(name)).filter(|path| path.exists()).max();
    program.expect("PostgreSQL is missing: apt-get install postgresql")
}
