//! The task of the leases: it requests leases from brokers, stores them, and sets the peers of the servers' interfaces
//! accordingly.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::time::sleep_until;
use tracing::{info, warn};
use wgkex_common::mqtt::{ConnectionState, Message, MqttHandle};
use wgkex_common::runtime::heartbeat::Heartbeat;
use wgkex_common::storage::writes::Writes;
use wgkex_common::storage::{Health, Noun, StorageError};
use wgkex_common::wire::lease::{AnnouncedServers, LeaseMessage, LeaseRequest};
use wgkex_common::wire::message::Hello;
use wgkex_common::{BrokerName, Config, Topic, WorkerName};
use wgkex_kernel::links::Links;
use wgkex_kernel::{Device, Kernel, forwarding};

use super::Metrics;
use super::brokers::Brokers;
use super::file::{self, StoredLeases, StoredServer};
use super::server::{ServerState, sources};
use super::server_status::ServerStatus;
use super::source::{Announced, LeaseSource, Offer};
use crate::plan::{changes, outcomes};

/// Queued events at most.
const LEASE_EVENTS_MAX: usize = 4096;
/// How long the task of a worker without servers sleeps.
const IDLE_SLEEP: Duration = Duration::from_secs(3600);
/// When a broker connects or disconnects, the requests of all workers spread over this time.
const REQUEST_JITTER: Duration = Duration::from_secs(1);

/// An event for the task.
#[derive(Debug, Clone)]
pub enum LeaseEvent {
    /// The hello of a broker; none if it is cleared.
    Broker(BrokerName, Option<Hello>),
    /// Leases of a server.
    Leases(LeaseMessage),
}

/// The sender of events to the task. Clones share it.
pub type LeaseSender = mpsc::Sender<LeaseEvent>;

/// The receiver of the same channel.
pub type LeaseReceiver = mpsc::Receiver<LeaseEvent>;

/// Whether the task is needed: the config has servers, or had some before, so that brokers have to learn of their
/// removal.
#[must_use]
pub fn is_needed(config: &Config) -> bool {
    !sources(config).is_empty() || file::path(&config.state_dir).exists()
}

/// The queue of events.
#[must_use]
pub fn channel() -> (LeaseSender, LeaseReceiver) {
    mpsc::channel(LEASE_EVENTS_MAX)
}

/// The parts from which the task is made.
pub struct LeaseParts<K> {
    /// The kernel with the servers' interfaces.
    pub kernel: K,
    /// The session on which the task publishes.
    pub bus: MqttHandle,
    /// The queue of events.
    pub events: LeaseReceiver,
    /// Its metrics.
    pub metrics: Metrics,
}

/// The owner of the servers' leases and peers.
pub struct LeaseTask<K> {
    kernel: K,
    bus: MqttHandle,
    connection: watch::Receiver<ConnectionState>,
    events: LeaseReceiver,
    metrics: Metrics,
    worker: WorkerName,
    external_name: String,
    servers: Vec<ServerState>,
    /// The brokers with a registry, or with tenants.
    brokers: Brokers,
    file: PathBuf,
    writes: Writes,
    /// The stored state of servers that are not in the config now.
    others: BTreeMap<String, StoredServer>,
    health: Health,
    states: watch::Sender<BTreeMap<String, ServerStatus>>,
    heartbeat: Heartbeat,
}

impl<K: Kernel> LeaseTask<K> {
    /// Loads the stored state. The errors are a file of a newer version, and one that cannot be read or renamed.
    pub fn open(config: &Config, parts: LeaseParts<K>) -> Result<Self, StorageError> {
        let LeaseParts { kernel, bus, events, metrics } = parts;
        let file = file::path(&config.state_dir);
        let (mut others, now) = (file::load(&file)?.servers, Instant::now());
        let servers = sources(config).into_iter().map(|(name, source)| {
            let stored = others.remove(&name).unwrap_or_default();
            ServerState::new(name, source, stored, now)
        });
        let servers: Vec<_> = servers.collect();
        let state = |server: &ServerState| {
            let interface = server.interface.name.clone();
            (server.name.clone(), ServerStatus { interface, ..ServerStatus::default() })
        };
        let states = watch::Sender::new(servers.iter().map(state).collect());
        Ok(Self {
            kernel,
            connection: bus.connection_state(),
            bus,
            events,
            metrics,
            worker: (&config.name).into(),
            external_name: config.external_name.clone(),
            servers,
            brokers: Brokers::default(),
            health: Health::new(file.clone(), Noun { name: "leases", pronoun: "them" }),
            file,
            writes: Writes::default(),
            others,
            states,
            heartbeat: Heartbeat::default(),
        })
    }

    /// The states of the servers.
    pub fn states(&self) -> watch::Receiver<BTreeMap<String, ServerStatus>> {
        self.states.subscribe()
    }

    /// The heartbeat of the task.
    pub fn heartbeat(&self) -> Heartbeat {
        self.heartbeat.clone()
    }

    fn set_state(&self, index: usize, reason: Option<&str>) {
        let ServerState { name, interface, table, .. } = &self.servers[index];
        let status = ServerStatus {
            interface: interface.name.clone(),
            up: reason.is_none(),
            reason: reason.map(str::to_owned),
            leases: table.leases().len() as u64,
        };
        self.states.send_modify(|states| drop(states.insert(name.clone(), status)));
    }

    /// Runs until `stop` returns, all senders of events are dropped, or the MQTT session has ended; then until the last
    /// write has ended.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        tokio::select! {
            biased;
            () = stop => {}
            () = self.follow() => {}
        }
        self.writes.finished().await;
    }

    async fn follow(&mut self) {
        let heartbeat = self.heartbeat();
        while heartbeat.wait_for(self.next_due()).await.is_some() {
            self.on_due().await;
        }
    }

    /// Handles events until a request or a comparison is due. Returns none when no more events can come.
    async fn next_due(&mut self) -> Option<()> {
        loop {
            let due = self.servers.iter().map(ServerState::due).min();
            let due = due.unwrap_or_else(|| Instant::now() + IDLE_SLEEP);
            tokio::select! {
                biased;
                changed = self.connection.changed() => {
                    changed.ok()?;
                    self.announce();
                }
                event = self.events.recv() => self.on_events(event?),
                () = self.kernel.changed() => self.expedite(),
                () = sleep_until(due.into()) => return Some(()),
            }
        }
    }

    fn expedite(&mut self) {
        let now = Instant::now();
        for server in &mut self.servers {
            server.expedite(now);
        }
    }

    /// Handles an event, and all that are queued behind it.
    fn on_events(&mut self, first: LeaseEvent) {
        let mut next = Some(first);
        while let Some(event) = next {
            match event {
                LeaseEvent::Broker(name, hello) => self.on_broker(name, hello.as_ref().map(Offer::from)),
                LeaseEvent::Leases(message) => self.on_leases(message),
            }
            next = self.events.try_recv().ok();
        }
    }

    /// A broker that connects may not have this worker's servers, and may have missed a change of them.
    fn on_broker(&mut self, name: BrokerName, offer: Option<Offer>) {
        let is_of_use = |offer: &Offer| self.servers.iter().any(|server| server.source.is_at(*offer));
        let Some(offer) = offer.filter(is_of_use) else {
            if let Some(offer) = self.brokers.on_offline(&name) {
                self.ask_soon(offer);
            }
            return;
        };
        self.ask_soon(offer);
        self.brokers.on_online(name, offer);
        self.announce();
    }

    /// Schedules a request for these leases after a random delay, since all workers of a fleet send one.
    fn ask_soon(&mut self, offer: Offer) {
        let (now, delay) = (Instant::now(), REQUEST_JITTER.mul_f64(fastrand::f64()));
        for server in self.servers.iter_mut().filter(|server| server.source.is_at(offer)) {
            server.ask_by(now + delay);
        }
    }

    fn on_leases(&mut self, message: LeaseMessage) {
        let Some(server) = self.servers.iter_mut().find(|server| server.name == message.server) else { return };
        server.on_message(message, Instant::now());
    }

    async fn on_due(&mut self) {
        let now = Instant::now();
        for index in 0..self.servers.len() {
            if self.servers[index].take_check(now) {
                self.reconcile(index).await;
            }
            if self.servers[index].request_due(now) {
                self.ask(index);
            }
        }
    }

    /// Requests the leases of a server, from its last version on.
    fn ask(&mut self, index: usize) {
        let server = &self.servers[index];
        for to in self.brokers.next(&server.source) {
            let request = LeaseRequest { to, server: server.name.clone(), known: server.table.version() };
            self.publish(Topic::LeaseRequests { worker: self.worker.clone() }, &request, Message::transient);
        }
    }

    /// Publishes the descriptions of this worker's servers, as far as their interfaces were read.
    fn announce(&self) {
        let is_up = *self.connection.borrow() == ConnectionState::Up;
        let mut all = AnnouncedServers::default();
        for server in &self.servers {
            match server.announced.clone() {
                Some(Announced::Server(announced)) => drop(all.servers.insert(server.name.clone(), announced)),
                Some(Announced::Hub(announced)) => all.hub = Some(announced),
                None => {}
            }
        }
        if is_up {
            let topic = Topic::WorkerServers { worker: self.worker.clone() };
            self.publish(topic, &all, Message::retained);
        }
    }

    fn publish<T: serde::Serialize>(&self, topic: Topic, payload: &T, message: fn(Topic, Vec<u8>) -> Message) {
        let payload = serde_json::to_vec(payload).unwrap_or_default();
        // A message for a full queue is dropped, and published again later.
        let _ = self.bus.try_publish(message(topic, payload));
    }

    /// Sets the peers of a server's interface by its leases.
    async fn reconcile(&mut self, index: usize) {
        let interface = self.servers[index].interface.clone();
        let read = self.kernel.read(&interface).await;
        self.heartbeat.beat();
        let device = match read {
            Ok(device) => device,
            Err(error) => return self.on_failure(index, &error.to_string()),
        };
        // A hub is neither published nor gets peers as long as its forwarding does not keep tenants apart.
        let now = Instant::now();
        if self.servers[index].is_forwarding_check_due(now) {
            let forwards = forward(&self.servers[index]).await;
            self.heartbeat.beat();
            if let Err(error) = forwards {
                return self.on_failure(index, &format!("members do not reach each other by it: {error}"));
            }
            self.servers[index].on_forwarding_checked(now);
        }
        self.on_device(index, &device);
        let server = &mut self.servers[index];
        let plan = server.plan(&device);
        let leases = i64::try_from(server.table.leases().len()).unwrap_or(i64::MAX);
        self.metrics.leases.with_label_values(&[server.name.as_str()]).set(leases);
        // A restart does not help against a disk that does not answer, and would stop the reconciler, which can do
        // without.
        self.heartbeat().wait_for(self.save()).await;
        let results = self.kernel.apply(&interface, changes(&plan.steps)).await;
        self.heartbeat.beat();
        let failed = outcomes(&plan.steps, results).into_iter().find_map(|(_, outcome)| outcome.err());
        match failed {
            Some(error) => self.on_failure(index, &error.to_string()),
            None if plan.foreign.is_empty() => self.on_success(index, plan.steps.len()),
            None => {
                let reason = format!("peers that are not of leases have {} of its keys", plan.foreign.len());
                self.on_failure(index, &reason);
            }
        }
    }

    /// Publishes the servers if the description of this one has changed.
    fn on_device(&mut self, index: usize, device: &Device) {
        let server = &mut self.servers[index];
        let announced = server.source.announced(device, &self.external_name);
        if announced.is_some() && announced != server.announced {
            server.announced = announced;
            self.announce();
        }
    }

    fn on_failure(&mut self, index: usize, reason: &str) {
        self.set_state(index, Some(reason));
        let ServerState { name, interface, is_failing, .. } = &mut self.servers[index];
        self.metrics.up.with_label_values(&[name.as_str()]).set(0);
        if !std::mem::replace(is_failing, true) {
            warn!(
                server = name.as_str(),
                interface = interface.name,
                reason,
                "the peers of the server are not all there"
            );
        }
    }

    fn on_success(&mut self, index: usize, steps: usize) {
        self.set_state(index, None);
        let ServerState { name, table, is_failing, .. } = &mut self.servers[index];
        self.metrics.up.with_label_values(&[name.as_str()]).set(1);
        if std::mem::take(is_failing) || steps > 0 {
            info!(
                server = name,
                leases = table.leases().len(),
                changes = steps,
                "the server has the peers of its leases"
            );
        }
    }

    /// Stores the changed state.
    async fn save(&mut self) {
        if !self.servers.iter().any(ServerState::is_unsaved) {
            return;
        }
        let servers = self.servers.iter().map(|server| (server.name.clone(), server.stored()));
        let servers = servers.chain(self.others.clone()).collect();
        let file = self.file.clone();
        match self.writes.run(move || file::save(&file, &StoredLeases { servers })).await {
            Ok(Ok(())) => {
                self.servers.iter_mut().for_each(ServerState::saved);
                self.health.succeeded();
            }
            Ok(Err(error)) => self.health.failed(&error),
            Err(error) => self.health.failed(&error),
        }
    }
}

/// Sets up the forwarding between the members at a hub again, in case another program removed it.
async fn forward(server: &ServerState) -> io::Result<()> {
    let LeaseSource::Tenants(hub) = &server.source else { return Ok(()) };
    let pool: Vec<_> = hub.networks.parts().collect();
    forwarding::enable(&Links::open()?, &hub.interface, &pool).await
}
