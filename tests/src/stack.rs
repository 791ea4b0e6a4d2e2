//! The broker on its bus, each on a free port of loopback: started, ready, and ended with the test. Tests that depend
//! on the bus run with each kind of it.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::{Mutex, PoisonError};

use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::http::{Http, Response, ask};
use crate::probe::{Probe, Role};
use crate::process::{Process, binary};
use crate::rabbitmq::RabbitMq;
use crate::wait_until;

/// The API that routers request first.
pub const V2: &str = "/api/v2/wg/key/exchange";
/// The API that routers use if the first one fails.
pub const V1: &str = "/api/v1/wg/key/exchange";
/// Removes the limit per client, as the routers of a test share one address; the limits of all clients together are the
/// default.
pub const ONE_ADDRESS: &str = "limits: {per_client: {burst: 0}}";
/// The domain of a stack by default.
pub const DOMAIN: &str = "ffx_a";

/// The MQTT server of a stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bus {
    /// The broker's own.
    Embedded,
    /// Debian's Mosquitto.
    Mosquitto,
    /// Debian's RabbitMQ.
    RabbitMq,
}

/// The configuration of a stack.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The MQTT server.
    pub bus: Bus,
    /// The domains; all begin with `ffx_`.
    pub domains: Vec<String>,
    /// More of the config, as YAML. Without `limits` in it, they are [`ONE_ADDRESS`].
    pub config: String,
    /// More of the environment.
    pub variables: Vec<(String, String)>,
    /// The command before every program, such as `ip netns exec NAME`; none if empty.
    pub wrapper: Vec<String>,
    /// User and password of all programs and probes, if the MQTT server requires a login.
    pub credentials: Option<(String, String)>,
    /// More of `mqtt_listen`, as keys of a YAML mapping; nothing if empty.
    pub listen: String,
    /// More lines of Mosquitto's config.
    pub mosquitto: String,
    /// More of `mqtt`, where the server is not the broker: keys of a YAML mapping, each behind a comma; nothing if empty.
    pub mqtt: String,
}

impl Plan {
    /// One domain, [`DOMAIN`], on `bus`, and defaults for the rest.
    #[must_use]
    pub fn new(bus: Bus) -> Self {
        Self {
            bus,
            domains: vec![DOMAIN.into()],
            config: String::new(),
            variables: Vec::new(),
            wrapper: Vec::new(),
            credentials: None,
            listen: String::new(),
            mosquitto: String::new(),
            mqtt: String::new(),
        }
    }

    /// With these domains.
    #[must_use]
    pub fn domains(self, domains: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { domains: domains.into_iter().map(Into::into).collect(), ..self }
    }

    /// With these lines of YAML in addition.
    #[must_use]
    pub fn config(mut self, yaml: &str) -> Self {
        self.config += yaml;
        self.config += "\n";
        self
    }

    /// With these keys of a YAML mapping in `mqtt_listen`.
    #[must_use]
    pub fn listen(self, keys: &str) -> Self {
        Self { listen: keys.into(), ..self }
    }

    /// The broker runs on a machine of this name. That needs root.
    #[must_use]
    pub fn host_name(mut self, name: &str) -> Self {
        let hostname = format!("hostname {name} && exec \"$@\"");
        self.wrapper = ["unshare", "--uts", "sh", "-c", &hostname, "sh"].map(str::to_owned).into();
        self
    }

    /// With this variable.
    #[must_use]
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.into(), value.into()));
        self
    }

    /// The command of `program` under this plan.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        let mut words = self.wrapper.iter().map(String::as_str);
        let mut command = match words.next() {
            Some(first) => {
                let mut command = Command::new(first);
                command.args(words).arg(program);
                command
            }
            None => Command::new(program),
        };
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command
    }
}

/// A broker and its bus.
pub struct Stack {
    /// Its configuration.
    pub plan: Plan,
    /// The address of the broker's HTTP server for routers.
    pub http: SocketAddr,
    /// The address of the MQTT server.
    pub mqtt: SocketAddr,
    dir: TempDir,
    broker: Option<Process>,
    mosquitto: Option<Process>,
    rabbitmq: Option<RabbitMq>,
}

impl Stack {
    /// A stack that is ready for routers.
    #[must_use]
    pub fn start(plan: Plan) -> Self {
        let mut stack = Self::prepare(plan);
        match stack.plan.bus {
            Bus::Embedded => {}
            Bus::Mosquitto => stack.start_mosquitto(),
            Bus::RabbitMq => stack.start_rabbitmq(),
        }
        stack.start_broker();
        stack.wait_until_ready();
        stack
    }

    /// A stack with ports and files, whose programs are not started.
    #[must_use]
    pub fn prepare(plan: Plan) -> Self {
        let dir = tempfile::Builder::new().prefix("wgkex-test-").tempdir().expect("a temporary directory");
        let (http, mqtt) = (free_address(), free_address());
        let mut stack = Self { plan, http, mqtt, dir, broker: None, mosquitto: None, rabbitmq: None };
        stack.write_config();
        stack
    }

    /// The config file, also for a worker.
    #[must_use]
    pub fn config_file(&self) -> PathBuf {
        self.dir.path().join("wgkex.yaml")
    }

    /// The directory of the programs' state.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// A directory that is removed after the test.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Writes the config again, after a change of the plan or the addresses.
    pub fn write_config(&mut self) {
        let domains = self.plan.domains.join(", ");
        let (http, bus, more) = (self.http, self.bus_config(), &self.plan.config);
        let state = self.state_dir();
        let state = state.display();
        let (listen, limits) = ("broker_listen:", "limits:");
        let unless = |key, line: String| if more.contains(key) { String::new() } else { line };
        let listen = unless(listen, format!("broker_listen: \"{http}\""));
        let limits = unless(limits, ONE_ADDRESS.into());
        let yaml = format!(
            "domains: [{domains}]\ndomain_prefixes: [ffx_]\n{listen}\nstate_dir: {state}\n{bus}\n{limits}\n{more}"
        );
        fs::write(self.config_file(), yaml).expect("write the config");
    }

    fn bus_config(&self) -> String {
        let (ip, port, more) = (self.mqtt.ip(), self.mqtt.port(), &self.plan.mqtt);
        match (self.plan.bus, &self.plan.credentials) {
            (Bus::Embedded, _) if !self.plan.listen.is_empty() => {
                format!("mqtt_listen: {{host: \"{ip}\", port: {port}, {}}}", self.plan.listen)
            }
            (Bus::Embedded, _) => format!("mqtt_listen: \"{ip}:{port}\""),
            (_, None) => format!("mqtt: {{broker_url: \"{ip}\", broker_port: {port}{more}}}"),
            (_, Some((user, password))) => format!(
                "mqtt: {{broker_url: \"{ip}\", broker_port: {port}, username: \"{user}\", password: \"{password}\"{more}}}"
            ),
        }
    }

    /// Starts Mosquitto with the users of a password file, and waits until it serves.
    pub fn start_mosquitto_with_users(&mut self, passwords: &Path) {
        self.start_mosquitto_by(&format!("password_file {}", passwords.display()));
    }

    /// Starts Mosquitto, and waits until it serves.
    pub fn start_mosquitto(&mut self) {
        let access = match &self.plan.credentials {
            None => "allow_anonymous true".into(),
            Some((user, password)) => format!("password_file {}", self.password_file(user, password).display()),
        };
        self.start_mosquitto_by(&access);
    }

    fn start_mosquitto_by(&mut self, access: &str) {
        self.mosquitto = Some(self.mosquitto_process(access));
        let what = format!("Mosquitto serves on {}", self.mqtt);
        wait_until(&what, || {
            let mosquitto = self.mosquitto.as_mut()?;
            assert!(mosquitto.is_running(), "Mosquitto ended: {}", mosquitto.log());
            std::net::TcpStream::connect(self.mqtt).ok()
        });
    }

    fn mosquitto_process(&self, access: &str) -> Process {
        let program = ["/usr/sbin/mosquitto", "/usr/bin/mosquitto", "/usr/local/sbin/mosquitto"];
        let program = program.into_iter().map(Path::new).find(|path| path.exists());
        let program = program.expect("Mosquitto is missing: apt-get install mosquitto");
        let (ip, port) = (self.mqtt.ip(), self.mqtt.port());
        let more = &self.plan.mosquitto;
        let config = format!("listener {port} {ip}\nuser root\npersistence false\nlog_dest stderr\n{access}\n{more}\n");
        let file = self.dir.path().join("mosquitto.conf");
        fs::write(&file, config).expect("write Mosquitto's config");
        Process::start("mosquitto", self.plan.command(program).arg("-c").arg(file))
    }

    fn password_file(&self, user: &str, password: &str) -> PathBuf {
        let file = self.dir.path().join("passwords");
        fs::write(&file, "").expect("write a password file");
        let made = Command::new("mosquitto_passwd").arg("-b").arg(&file).args([user, password]).status();
        assert!(made.expect("mosquitto_passwd runs").success(), "mosquitto_passwd fails");
        file
    }

    /// Starts RabbitMQ, and waits until it serves.
    pub fn start_rabbitmq(&mut self) {
        self.rabbitmq = Some(RabbitMq::start(&self.plan, self.mqtt, self.dir.path()));
    }

    /// Starts the broker, and does not wait.
    pub fn start_broker(&mut self) {
        self.broker = Some(self.program("wgkex-broker", &[]));
    }

    /// Starts a program of this workspace with this stack's config.
    #[must_use]
    pub fn program(&self, name: &str, arguments: &[&str]) -> Process {
        let mut command = self.plan.command(&binary(name));
        Process::start(name, command.args(arguments).env("WGKEX_CONFIG_FILE", self.config_file()))
    }

    /// Waits until the broker reports that it is ready.
    pub fn wait_until_ready(&mut self) {
        let http = self.http;
        let broker = self.broker.as_mut().expect("a broker that runs");
        wait_until("the broker is ready", || {
            assert!(broker.is_running(), "the broker ended:\n{}", broker.log());
            let response = Http::try_connect(http).ok()?.get("/readyz");
            (response.status == 200).then_some(())
        });
    }

    /// The broker that runs.
    #[must_use]
    pub fn broker(&mut self) -> &mut Process {
        self.broker.as_mut().expect("a broker that runs")
    }

    /// The Mosquitto that runs.
    #[must_use]
    pub fn mosquitto(&mut self) -> &mut Process {
        self.mosquitto.as_mut().expect("a Mosquitto that runs")
    }

    /// Kills the program that runs the MQTT server, and starts it again.
    pub fn kill_and_restart_bus(&mut self) {
        match self.plan.bus {
            Bus::Embedded => {
                let _ = self.broker().end_by(Signal::SIGKILL);
                self.start_broker();
            }
            Bus::Mosquitto => {
                let _ = self.mosquitto().end_by(Signal::SIGKILL);
                self.start_mosquitto();
            }
            Bus::RabbitMq => self.rabbitmq.as_mut().expect("a RabbitMQ that runs").kill_and_restart(),
        }
    }

    /// Stops the broker as systemd does.
    pub fn stop_broker(&mut self) -> ExitStatus {
        self.broker().end_by(Signal::SIGTERM)
    }

    /// A new connection to the broker.
    #[must_use]
    pub fn connect(&self) -> Http {
        Http::connect(self.http)
    }

    /// The broker's answer to `GET path`.
    #[must_use]
    pub fn get(&self, path: &str) -> Response {
        self.connect().get(path)
    }

    /// The answer to a router of an older firmware with this key.
    #[must_use]
    pub fn v1(&self, domain: &str, key: &str) -> Response {
        self.connect().post(V1, &ask(domain, key))
    }

    /// The answer to a router with this key.
    #[must_use]
    pub fn v2(&self, domain: &str, key: &str) -> Response {
        self.connect().post(V2, &ask(domain, key))
    }

    /// The value of a series of the broker's metrics, by its name with labels.
    #[must_use]
    pub fn metric(&self, series: &str) -> Option<f64> {
        let metrics = self.get("/metrics").body;
        metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
    }

    /// Waits until a series of the broker's metrics has this value.
    pub fn wait_for_metric(&self, series: &str, value: f64) {
        wait_until(&format!("{series} is {value}"), || {
            self.metric(series).filter(|now| (now - value).abs() < f64::EPSILON)
        });
    }

    /// Waits until so many gateways are online for the broker.
    pub fn wait_for_gateways(&self, online: u32) {
        self.wait_for_metric("wgkex_broker_gateways{state=\"online\"}", f64::from(online));
    }

    /// A client on the bus.
    #[must_use]
    pub fn probe(&self, role: Role) -> Probe {
        let role = match &self.plan.credentials {
            Some((user, password)) => role.credentials(user, password),
            None => role,
        };
        Probe::connect(self.mqtt, role)
    }

    /// A client that receives every message on the bus.
    #[must_use]
    pub fn witness(&self) -> Probe {
        self.probe(Role::new("witness", &["#"]))
    }
}

/// A free address of loopback, which no other test gets while this process runs. The ports lie below those that Linux
/// gives to outgoing connections, so that they are still free when the program binds them.
#[must_use]
pub fn free_address() -> SocketAddr {
    static RESERVED: Mutex<Vec<File>> = Mutex::new(Vec::new());
    let begin = std::process::id() % 1_000_000 * 50;
    let (address, lock) = (0..12_000)
        .map(|n| u16::try_from(20_000 + (begin + n) % 12_000).expect("a port"))
        .map(|port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port))
        .find_map(|address| Some((address, reserve(address)?)))
        .expect("a free port");
    RESERVED.lock().unwrap_or_else(PoisonError::into_inner).push(lock);
    address
}

/// The lock that reserves a port among all tests of this user, also in other processes; none if another test has it.
fn reserve(address: SocketAddr) -> Option<File> {
    let dir = std::env::temp_dir().join(format!("wgkex-test-ports-{}", nix::unistd::getuid()));
    fs::create_dir_all(&dir).expect("a directory");
    let lock = File::create(dir.join(address.port().to_string())).expect("a file");
    lock.try_lock().ok()?;
    TcpListener::bind(address).ok()?;
    Some(lock)
}
