//! Debian's RabbitMQ with its MQTT plugin, separate from any other on this machine: with its own ports, name and files.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::process::Process;
use crate::stack::{Plan, free_address};
use crate::wait_within;

/// The program behind the package's command, which would change to another user and write to the machine's directories.
const RABBITMQ_PROGRAM: &str = "/usr/lib/rabbitmq/bin/rabbitmq-server";

/// It starts slowly: for 6 s it waits for other nodes.
const START: Duration = Duration::from_secs(180);

/// A RabbitMQ that serves MQTT, without passwords.
pub struct RabbitMq {
    plan: Plan,
    mqtt: SocketAddr,
    epmd_port: u16,
    node_port: u16,
    dir: PathBuf,
    // Dropped before epmd, by which nodes find each other.
    server: Process,
    _epmd: Process,
}

impl RabbitMq {
    /// Starts one with its files below `dir`, and waits until it serves on `mqtt`.
    #[must_use]
    pub fn start(plan: &Plan, mqtt: SocketAddr, dir: &Path) -> Self {
        assert!(Path::new(RABBITMQ_PROGRAM).exists(), "RabbitMQ is missing: apt-get install rabbitmq-server");
        let (plan, dir) = (plan.clone(), dir.join("rabbitmq"));
        let (epmd_port, node_port) = (free_address().port(), free_address().port());
        fs::create_dir_all(&dir).expect("a directory");
        let listen = format!("listeners.tcp = none\nmqtt.listeners.tcp.default = {mqtt}\n");
        fs::write(dir.join("rabbitmq.conf"), listen + "mqtt.allow_anonymous = true\n").expect("write its config");
        fs::write(dir.join("plugins"), "[rabbitmq_mqtt].").expect("write its list of plugins");
        let mut epmd = program(&plan, "epmd");
        let epmd = Process::start("epmd", epmd.args(["-address", "127.0.0.1", "-port", &epmd_port.to_string()]));
        let server = server(&plan, &dir, epmd_port, node_port);
        let mut started = Self { plan, mqtt, epmd_port, node_port, dir, server, _epmd: epmd };
        started.wait_until_it_serves();
        started
    }

    /// Kills it, and starts it again with its files.
    pub fn kill_and_restart(&mut self) {
        let _ = self.server.end_by(Signal::SIGKILL);
        self.server = server(&self.plan, &self.dir, self.epmd_port, self.node_port);
        self.wait_until_it_serves();
    }

    fn wait_until_it_serves(&mut self) {
        wait_within(START, &format!("RabbitMQ serves on {}", self.mqtt), || {
            assert!(self.server.is_running(), "RabbitMQ ended: {}", self.server.log());
            TcpStream::connect(self.mqtt).ok()
        });
    }
}

fn server(plan: &Plan, dir: &Path, epmd_port: u16, node_port: u16) -> Process {
    let mut command = program(plan, RABBITMQ_PROGRAM);
    command
        .env("HOME", dir)
        .env("ERL_EPMD_PORT", epmd_port.to_string())
        // The script then replaces itself by the server instead of watching it.
        .env("RUNNING_UNDER_SYSTEMD", "true")
        .env("RABBITMQ_CONF_ENV_FILE", "/dev/null")
        .env("RABBITMQ_NODENAME", format!("test{node_port}@127.0.0.1"))
        .env("RABBITMQ_USE_LONGNAME", "true")
        .env("RABBITMQ_DIST_PORT", node_port.to_string())
        .env("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "-kernel inet_dist_use_interface {127,0,0,1}")
        .env("RABBITMQ_CONFIG_FILE", dir.join("rabbitmq.conf"))
        .env("RABBITMQ_ENABLED_PLUGINS_FILE", dir.join("plugins"))
        .env("RABBITMQ_MNESIA_BASE", dir.join("data"))
        .env("RABBITMQ_LOG_BASE", dir)
        .env("RABBITMQ_LOGS", "-");
    Process::start("rabbitmq", &mut command)
}

/// A command that ends with the test, also when the test is killed.
fn program(plan: &Plan, name: &str) -> std::process::Command {
    let mut command = plan.command(Path::new("setpriv"));
    command.args(["--pdeathsig", "KILL", "--", name]);
    command
}
