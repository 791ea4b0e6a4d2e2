//! A program under test, or one that it needs: started with its output captured, and ended with the test.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{wait_until, wait_within};

/// How long a systemd in an emulated machine may take to start a program.
const STARTED: Duration = Duration::from_secs(120);

/// A running program. Dropping it kills it; if the test fails, its log is printed then.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    /// The program's process id; it may be a descendant of `child`.
    pid: u32,
    /// Standard output and error, in an unnamed file. Not a pipe: output can be read at once, so that a test that has
    /// observed an effect of the program finds the lines that were logged before it.
    log: File,
}

/// The program `name` of this workspace, built in the same profile as the one that runs.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let this = std::env::current_exe().expect("the path of this program");
    // target/PROFILE for a program, target/PROFILE/deps for a test.
    let built = this.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.exists());
    built.unwrap_or_else(|| panic!("{name} is not built beside {}: run `cargo build --workspace`", this.display()))
}

/// The process of this program among the descendants of a process.
fn find_below(pid: u32, program: &str) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().filter_map(|child| child.parse().ok()).find_map(|child| {
        let name = fs::read_to_string(format!("/proc/{child}/comm")).ok()?;
        if name.trim_end() == program { Some(child) } else { find_below(child, program) }
    })
}

/// The resident memory of a process, in KiB.
#[must_use]
pub fn memory(pid: u32) -> u32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process that runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok()).expect("its memory")
}

/// The hash of a password, by the broker's command.
#[must_use]
pub fn hash(password: &str) -> String {
    let mut command = Command::new(binary("wgkex-broker"));
    let command = command.arg("hash-password").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("the broker's program");
    let mut input = child.stdin.take().expect("its input");
    input.write_all(format!("{password}\nsomething else").as_bytes()).expect("it reads");
    drop(input);
    let output = child.wait_with_output().expect("its end");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text").trim_end().to_owned()
}

impl Process {
    /// Starts `command`, under `name` in the test's output.
    #[must_use]
    pub fn start(name: &str, command: &mut Command) -> Self {
        Self::start_with_log(name, command, tempfile::tempfile().expect("a file for the log"))
    }

    /// Starts `command`, which starts `program` as a descendant, ends with it and with its exit code, and ends it when
    /// killed. Signals are sent to the program. Both write to `log`.
    #[must_use]
    pub fn start_below(name: &str, command: &mut Command, program: &str, log: File) -> Self {
        let mut process = Self::start_with_log(name, command, log);
        process.pid = wait_within(STARTED, &format!("{program} of {name} starts, or fails"), || {
            let child = process.child.id();
            find_below(child, program).or_else(|| (!process.is_running()).then_some(child))
        });
        process
    }

    fn start_with_log(name: &str, command: &mut Command, log: File) -> Self {
        let output = || Stdio::from(log.try_clone().expect("the log's descriptor"));
        let command = command.stdin(Stdio::null()).stdout(output()).stderr(output());
        let child = command.spawn().unwrap_or_else(|error| panic!("{name} does not start: {error} ({command:?})"));
        Self { name: name.into(), pid: child.id(), child, log }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends it a signal: `SIGTERM` to end, `SIGKILL` to die, `SIGSTOP` to freeze, `SIGCONT` to thaw.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.pid.try_into().expect("a process id"));
        kill(pid, signal).unwrap_or_else(|error| panic!("{signal} to {}: {error}", self.name));
        if signal == Signal::SIGSTOP {
            wait_until(&format!("{} stands still", self.name), || is_stopped(pid).then_some(()));
        }
    }

    /// Waits for its end.
    #[must_use]
    pub fn wait(&mut self) -> ExitStatus {
        wait_until(&format!("{} ends", self.name), || self.child.try_wait().expect("wait for a child"))
    }

    /// Waits for the end of the program, but not of the `command` that started it.
    pub fn wait_for_program(&mut self) {
        wait_until(&format!("the program of {} ends", self.name), || {
            (!self.is_running() || !Path::new(&format!("/proc/{}", self.pid)).exists()).then_some(())
        });
    }

    /// Sends `signal` and waits for its end.
    pub fn end_by(&mut self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        self.wait()
    }

    /// Whether it still runs.
    #[must_use]
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("wait for a child").is_none()
    }

    /// Its output so far, standard output and error.
    #[must_use]
    pub fn log(&self) -> String {
        let mut log = vec![0; self.log.metadata().expect("the log").len().try_into().expect("a log that fits")];
        self.log.read_exact_at(&mut log, 0).expect("the log");
        String::from_utf8_lossy(&log).into_owned()
    }

    /// Waits for a line of its log that contains `text`.
    #[expect(clippy::must_use_candidate, reason = "mostly it is awaited, and not looked at")]
    pub fn wait_for_log(&self, text: &str) -> String {
        wait_until(&format!("{text:?} in the log of {}", self.name), || {
            self.log().lines().find(|line| line.contains(text)).map(str::to_owned)
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The process may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            self.print_log();
        }
    }
}

impl Process {
    #[expect(clippy::print_stderr, reason = "the test runner shows it with the failed test")]
    fn print_log(&self) {
        eprintln!("---- log of {} ----\n{}", self.name, self.log());
    }
}

/// Whether no thread of the process runs: on a busy machine threads run on for a while after the signal.
fn is_stopped(process: Pid) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{process}/task")) else { return true };
    threads.flatten().all(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        // The name before the state may contain blanks and parentheses.
        stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['T', 't', 'Z']))
    })
}
