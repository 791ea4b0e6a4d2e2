//! The one task that owns all tenants, and the handle by which sessions send it commands. It only waits for the next
//! event: [`Coordination`] decides, and a message for which the MQTT session has no room is lost, which the other
//! broker notices.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Fuse, FusedFuture as _};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{MissedTickBehavior, interval};
use wgkex_common::mqtt::{ConnectionState, Message, MqttHandle};
use wgkex_common::wire::lease::{AnnouncedHub, LeaseMessage, LeaseRequest};
use wgkex_common::wire::message::ServiceAnnouncement;
use wgkex_common::{BrokerName, Topic, WorkerName};

use crate::tenants::close::CloseCause;
use crate::tenants::coordination::Coordination;
use crate::tenants::frame::{Frame, JoinRequest, SessionId};
use crate::tenants::metrics::{Leave, Metrics};
use crate::tenants::sessions::{Outgoing, SessionLink};
use crate::tenants::store::AddressBuffer;
use crate::tenants::table::MemberInfo;
use crate::tenants::upgrade_request::UpgradeRequest;

/// How often to check time limits.
const TENANTS_CHECK_INTERVAL: Duration = Duration::from_millis(250);
/// The most commands of sessions that are queued; further ones wait.
const COMMANDS_MAX: usize = 1024;
/// Messages of other brokers that wait; more are lost.
const BROKER_EVENTS_MAX: usize = 1024;
/// Commands and events that are handled before frames are sent.
const BURST_MAX: usize = 256;
/// The most unread messages for a member, beyond those that its connection holds: more than a large tenant has members.
/// The texts in it are shared by all members.
const QUEUE_MAX: usize = 4096;

/// A command of a session.
#[derive(Debug)]
enum Command {
    Join(JoinRequest, SessionLink),
    Leave(SessionId, Leave),
    /// The member has answered a probe.
    Alive(SessionId),
}

/// An event received by MQTT.
#[derive(Debug)]
pub enum TenantEvent {
    /// A broker is online, or no longer.
    Status(BrokerName, bool),
    /// The service that a broker announces; none if it withdrew that.
    Hello(BrokerName, Option<ServiceAnnouncement>),
    /// A message to this broker.
    Frame(Frame),
    /// The hub that a worker announces; none if it withdrew that.
    Hub(WorkerName, Option<AnnouncedHub>),
    /// A worker requests the addresses of its hub.
    LeaseRequest(WorkerName, LeaseRequest),
}

/// Sends events to the task. An event for which there is no room is lost.
pub type TenantEventSender = mpsc::Sender<TenantEvent>;

/// The handle to the tenants' task. Clones share it.
#[derive(Debug, Clone)]
pub struct TenantsHandle {
    commands: mpsc::Sender<Command>,
    last: Arc<AtomicU64>,
}

/// A session's place among the members, or on the way there, as the session sees it.
#[derive(Debug)]
pub struct Membership {
    /// Reports to the task.
    pub reporter: SessionReporter,
    /// The messages that the session is to send.
    pub queue: mpsc::Receiver<Outgoing>,
    /// When it is to ask the member whether it is alive.
    pub probes: mpsc::Receiver<()>,
    /// Why it is to end.
    pub end: oneshot::Receiver<CloseCause>,
}

/// Reports of a session to the task.
#[derive(Debug)]
pub struct SessionReporter {
    session: SessionId,
    commands: mpsc::Sender<Command>,
}

/// The task that owns the tenants.
#[derive(Debug)]
pub struct TenantService {
    tenants: Coordination,
    kept: AddressBuffer,
    metrics: Metrics,
    announced: watch::Sender<ServiceAnnouncement>,
    commands: mpsc::Receiver<Command>,
    events: mpsc::Receiver<TenantEvent>,
}

impl TenantsHandle {
    /// Asks for a place among the members of a tenant. The queue delivers the answer, or `end` the reason of a refusal.
    pub async fn join(
        &self,
        upgrade_request: &UpgradeRequest,
        member_info: MemberInfo,
    ) -> Result<Membership, CloseCause> {
        let session = SessionId(self.last.fetch_add(1, Ordering::Relaxed));
        let (sender, queue) = mpsc::channel(QUEUE_MAX);
        let (probe_sender, probes) = mpsc::channel(1);
        let (ended, end) = oneshot::channel();
        let UpgradeRequest { client, tenant, form, .. } = upgrade_request;
        let link = SessionLink { client: *client, form: *form, queue: sender, probes: probe_sender, end: ended };
        let command = Command::Join(JoinRequest { session, tenant: tenant.clone(), client: member_info }, link);
        self.commands.send(command).await.map_err(|_| CloseCause::Stopping)?;
        Ok(Membership { reporter: SessionReporter { session, commands: self.commands.clone() }, queue, probes, end })
    }

    /// Returns when the broker stops.
    pub async fn stopped(&self) {
        self.commands.closed().await;
    }
}

impl SessionReporter {
    /// The member has answered a probe.
    pub async fn alive(&self) {
        // An error means that the broker stops.
        let _ = self.commands.send(Command::Alive(self.session)).await;
    }

    /// The session is over.
    pub async fn leave(self, leave: Leave) {
        let _ = self.commands.send(Command::Leave(self.session, leave)).await;
    }
}

impl TenantService {
    /// The task, and the handles to it.
    pub fn new(
        mut tenants: Coordination,
        kept: AddressBuffer,
        metrics: Metrics,
    ) -> (Self, TenantsHandle, TenantEventSender) {
        let announced = watch::Sender::new(tenants.election().announced().clone());
        let (sender, commands) = mpsc::channel(COMMANDS_MAX);
        let (event_sender, events) = mpsc::channel(BROKER_EVENTS_MAX);
        let handle = TenantsHandle { commands: sender, last: Arc::default() };
        (Self { tenants, kept, metrics, announced, commands, events }, handle, event_sender)
    }

    /// The service that this broker announces.
    pub fn announced(&self) -> watch::Receiver<ServiceAnnouncement> {
        self.announced.subscribe()
    }

    /// Serves sessions until `stop` returns, and then ends them. Frames for other brokers go to `bus`.
    pub async fn run(mut self, bus: MqttHandle, stop: impl Future<Output = ()>) {
        let mut stop = pin!(stop);
        let mut ticks = interval(TENANTS_CHECK_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let connection = bus.connection_state();
        let mut under_way = Fuse::terminated();
        loop {
            tokio::select! {
                biased;
                () = &mut stop => break,
                _ = ticks.tick() => {
                    let is_up = *connection.borrow() == ConnectionState::Up;
                    self.tick(is_up, Instant::now());
                }
                () = &mut under_way => {}
                Some(event) = self.events.recv() => self.on_event(event, Instant::now()),
                Some(command) = self.commands.recv() => self.on_command(command, Instant::now()),
            }
            for _ in 0..BURST_MAX {
                let now = Instant::now();
                if let Ok(event) = self.events.try_recv() {
                    self.on_event(event, now);
                } else if let Ok(command) = self.commands.try_recv() {
                    self.on_command(command, now);
                } else {
                    break;
                }
            }
            // Further frames are sent when the server has those before: no router's key waits behind more of them.
            if under_way.is_terminated() {
                under_way = publish(&bus, self.tenants.take_frames(Instant::now()));
            }
            if let Some((worker, messages)) = self.tenants.take_hub_messages(Instant::now()) {
                publish_to_hub(&bus, &worker, &messages);
            }
            self.metrics.set(self.tenants.counts());
        }
        for frame in self.tenants.stop(Instant::now()) {
            let _ = bus.try_publish(message(frame));
        }
    }

    fn on_command(&mut self, command: Command, now: Instant) {
        match command {
            Command::Join(join_request, link) => self.tenants.join(join_request, link, now),
            Command::Leave(session, leave) => self.tenants.leave(session, leave, now),
            Command::Alive(session) => self.tenants.alive(session, now),
        }
    }

    fn on_event(&mut self, event: TenantEvent, now: Instant) {
        match event {
            TenantEvent::Status(broker, is_online) => {
                self.tenants.election().on_status(broker, is_online, now);
                self.tenants.elect(now);
            }
            TenantEvent::Hello(broker, announced) => {
                self.tenants.election().on_hello(broker, announced, now);
                self.tenants.elect(now);
            }
            TenantEvent::Frame(frame) if frame.is_bounded() => self.tenants.on_frame(frame, now),
            // The missing number is noticed, and all sessions are registered again.
            TenantEvent::Frame(_) => {}
            TenantEvent::Hub(worker, announced) => self.tenants.on_hub(&worker, announced, now),
            TenantEvent::LeaseRequest(worker, request) => self.tenants.on_lease_request(&worker, &request),
        }
    }

    fn tick(&mut self, is_bus_up: bool, now: Instant) {
        self.tenants.on_bus(is_bus_up, now);
        self.tenants.tick(now);
        let announced = self.tenants.election().announced();
        if *announced != *self.announced.borrow() {
            self.announced.send_replace(announced.clone());
        }
        if self.kept.needs_full_write() {
            self.tenants.write_all();
        }
    }
}

/// Publishes frames; the returned future ends when the server has all of them. A frame for which there is no room is
/// missed by the other broker, and all sessions are registered again.
fn publish(bus: &MqttHandle, mut frames: Vec<(BrokerName, Frame)>) -> Fuse<BoxFuture<'static, ()>> {
    let Some(last) = frames.pop() else { return Fuse::terminated() };
    for frame in frames {
        let _ = bus.try_publish(message(frame));
    }
    let (bus, last) = (bus.clone(), message(last));
    // The frame is lost with the session.
    async move { bus.publish(last).await.unwrap_or_default() }.boxed().fuse()
}

fn message((broker, frame): (BrokerName, Frame)) -> Message {
    let payload = serde_json::to_vec(&frame).unwrap_or_default();
    Message::transient(Topic::BrokerTenants { broker }, payload)
}

/// A message for which there is no room is missed by the worker, which then requests all addresses.
fn publish_to_hub(bus: &MqttHandle, worker: &WorkerName, messages: &[LeaseMessage]) {
    for message in messages {
        let payload = serde_json::to_vec(message).unwrap_or_default();
        let _ = bus.try_publish(Message::transient(Topic::WorkerLeases { worker: worker.clone() }, payload));
    }
}
