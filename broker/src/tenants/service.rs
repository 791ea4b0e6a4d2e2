//! The one task that owns all tenants, and the handle by which sessions talk to it. It waits for no session: what a member is
//! to receive goes into the member's queue, and a member whose queue is full is dropped.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytestring::ByteString;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval};

use crate::tenants::Metrics;
use crate::tenants::close::CloseCause;
use crate::tenants::id::TenantId;
use crate::tenants::message::{Form, announcement, removal};
use crate::tenants::pool::{Change, Tenants};
use crate::tenants::store::AddressBuffer;
use crate::tenants::table::{JoinError, Member, Newcomer, SessionId};

/// How long a member has to show that it is alive, when another session joins with its key.
pub const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often to look for what is over.
const TICK: Duration = Duration::from_millis(250);
/// What sessions may have asked for and did not get yet; more of them wait.
const COMMANDS_MAX: usize = 1024;
/// What a member may have been sent and has not read yet, beyond what its connection holds: more messages than a large
/// tenant has members. The texts in it are shared by all members.
const QUEUE_MAX: usize = 4096;

/// What a session asks for.
#[derive(Debug)]
enum Command {
    Join(Box<JoinRequest>),
    Leave(SessionId, Leave),
    /// The member has answered a probe.
    Alive(SessionId),
}

/// A session's wish to be a member.
#[derive(Debug)]
struct JoinRequest {
    session: SessionId,
    tenant: TenantId,
    client: Newcomer,
    link: SessionLink,
}

/// How a session is reached.
#[derive(Debug)]
struct SessionLink {
    form: Form,
    queue: mpsc::Sender<Outgoing>,
    end: oneshot::Sender<CloseCause>,
}

/// What a session is to send.
#[derive(Debug)]
pub enum Outgoing {
    /// It is a member at this address; these were before.
    Answer(IpAddr, Vec<Arc<Member>>),
    /// A message about another member.
    Text(ByteString),
    /// A ping whose answer is to be reported by [`Seat::alive`].
    Probe,
}

/// Why a member leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr, strum::VariantNames)]
#[strum(serialize_all = "snake_case")]
pub enum Leave {
    /// It closed its WebSocket, or lost the connection.
    Closed,
    /// It sent what is not allowed.
    Refused,
    /// It does not answer.
    Silent,
    /// It does not read.
    Slow,
}

/// The way to the tenants. Clones lead to the same ones.
#[derive(Debug, Clone)]
pub struct TenantsHandle {
    commands: mpsc::Sender<Command>,
    last: Arc<AtomicU64>,
}

/// A session's place among the members, or on the way there, as the session sees it.
#[derive(Debug)]
pub struct Membership {
    /// The way back.
    pub seat: Seat,
    /// What the session is to send.
    pub queue: mpsc::Receiver<Outgoing>,
    /// Why it is to end.
    pub end: oneshot::Receiver<CloseCause>,
}

/// How a session reports what becomes of it.
#[derive(Debug)]
pub struct Seat {
    session: SessionId,
    commands: mpsc::Sender<Command>,
}

/// The task that owns the tenants.
#[derive(Debug)]
pub struct TenantService {
    tenants: Tenants,
    members: BTreeMap<SessionId, MemberSession>,
    /// By the session that is to answer.
    probes: BTreeMap<SessionId, Probe>,
    kept: AddressBuffer,
    metrics: Metrics,
    commands: mpsc::Receiver<Command>,
}

#[derive(Debug)]
struct MemberSession {
    tenant: TenantId,
    link: SessionLink,
}

/// Sessions that wait for the answer of a member that has their key.
#[derive(Debug)]
struct Probe {
    until: Instant,
    waiting: Vec<JoinRequest>,
}

/// A message to several members, in both forms.
struct Broadcast {
    plain: ByteString,
    with_endpoints: ByteString,
}

impl TenantsHandle {
    /// Asks for a place among the members of a tenant. The answer comes by the queue, or the reason against it by the end.
    pub async fn join(&self, tenant: TenantId, client: Newcomer, form: Form) -> Result<Membership, CloseCause> {
        let session = SessionId(self.last.fetch_add(1, Ordering::Relaxed));
        let (sender, queue) = mpsc::channel(QUEUE_MAX);
        let (ended, end) = oneshot::channel();
        let link = SessionLink { form, queue: sender, end: ended };
        let request = Box::new(JoinRequest { session, tenant, client, link });
        self.commands.send(Command::Join(request)).await.map_err(|_| CloseCause::Stopping)?;
        Ok(Membership { seat: Seat { session, commands: self.commands.clone() }, queue, end })
    }

    /// Returns when the broker stops.
    pub async fn stopped(&self) {
        self.commands.closed().await;
    }
}

impl Seat {
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
    /// The task, and the way to it.
    pub fn new(tenants: Tenants, kept: AddressBuffer, metrics: Metrics) -> (Self, TenantsHandle) {
        let (sender, commands) = mpsc::channel(COMMANDS_MAX);
        let handle = TenantsHandle { commands: sender, last: Arc::default() };
        let (members, probes) = (BTreeMap::new(), BTreeMap::new());
        (Self { tenants, members, probes, kept, metrics, commands }, handle)
    }

    /// Serves sessions until `stop` returns, and then ends them.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        let mut stop = pin!(stop);
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = &mut stop => break,
                _ = ticks.tick() => self.tick(Instant::now()),
                Some(command) = self.commands.recv() => self.on_command(command, Instant::now()),
            }
            self.keep_changes();
        }
        self.keep_changes();
        self.stop();
    }

    fn on_command(&mut self, command: Command, now: Instant) {
        match command {
            Command::Join(request) => self.join(*request, now),
            Command::Leave(session, leave) => {
                self.withdraw(session);
                self.remove(session, leave, None, now);
            }
            Command::Alive(session) => {
                for request in self.probes.remove(&session).into_iter().flat_map(|probe| probe.waiting) {
                    request.refuse(CloseCause::KeyInUse);
                }
            }
        }
    }

    fn tick(&mut self, now: Instant) {
        self.tenants.expire(now);
        let silent = self.probes.iter().filter(|(_, probe)| probe.until <= now).map(|(session, _)| *session);
        for session in silent.collect::<Vec<_>>() {
            self.remove(session, Leave::Silent, Some(CloseCause::Silent), now);
        }
    }

    fn join(&mut self, request: JoinRequest, now: Instant) {
        if request.link.queue.is_closed() {
            return;
        }
        match self.tenants.join(&request.tenant, request.session, request.client.clone(), now) {
            Ok(member) => self.admit(request, &member, now),
            Err(JoinError::KeyInUse(holder)) => self.probe(holder, request, now),
            Err(JoinError::NoAddress) => request.refuse(CloseCause::NoAddress),
            Err(JoinError::NoNetwork) => request.refuse(CloseCause::NoNetwork),
        }
    }

    /// Answers a new member, and announces it to the others.
    fn admit(&mut self, request: JoinRequest, member: &Member, now: Instant) {
        let JoinRequest { session, tenant, link, .. } = request;
        let peers = self.tenants.members(&tenant).filter(|(other, _)| *other != session);
        let answer = Outgoing::Answer(member.virtual_ip, peers.map(|(_, peer)| peer.clone()).collect());
        if link.queue.try_send(answer).is_err() {
            // Its session has ended, and nobody knows of it.
            self.tenants.leave(&tenant, session, now);
            return;
        }
        self.metrics.joins.inc();
        self.members.insert(session, MemberSession { tenant: tenant.clone(), link });
        let announced = Broadcast::announcement(member);
        for slow in self.broadcast(&tenant, session, &announced) {
            self.remove(slow, Leave::Slow, Some(CloseCause::Slow), now);
        }
    }

    /// Asks the member that has a key whether it is alive, for a newcomer with the same key.
    fn probe(&mut self, holder: SessionId, request: JoinRequest, now: Instant) {
        if let Some(probe) = self.probes.get_mut(&holder) {
            probe.waiting.push(request);
            return;
        }
        self.probes.insert(holder, Probe { until: now + PROBE_TIMEOUT, waiting: vec![request] });
        let is_asked =
            self.members.get(&holder).is_some_and(|member| member.link.queue.try_send(Outgoing::Probe).is_ok());
        if !is_asked {
            self.remove(holder, Leave::Slow, Some(CloseCause::Slow), now);
        }
    }

    /// Sends a message to the members of a tenant except one; returns those that have no room for it.
    fn broadcast(&self, tenant: &TenantId, except: SessionId, message: &Broadcast) -> Vec<SessionId> {
        let mut slow = Vec::new();
        for (session, _) in self.tenants.members(tenant).filter(|(session, _)| *session != except) {
            let Some(MemberSession { link, .. }) = self.members.get(&session) else { continue };
            if link.queue.try_send(Outgoing::Text(message.text(link.form))).is_err() {
                slow.push(session);
            }
        }
        slow
    }

    /// A member leaves, which the others learn; those that have no room for that leave, too. `end` is what its session is
    /// to end with.
    fn remove(&mut self, session: SessionId, leave: Leave, end: Option<CloseCause>, now: Instant) {
        let mut leaving = vec![(session, leave, end)];
        while let Some((session, leave, end)) = leaving.pop() {
            let Some(MemberSession { tenant, link }) = self.members.remove(&session) else { continue };
            let Some(member) = self.tenants.leave(&tenant, session, now) else { continue };
            self.metrics.leaves.with_label_values(&[<&str>::from(leave)]).inc();
            if let Some(end) = end {
                // It may have ended by itself.
                let _ = link.end.send(end);
            }
            let slow = self.broadcast(&tenant, session, &Broadcast::removal(member.virtual_ip));
            leaving.extend(slow.into_iter().map(|slow| (slow, Leave::Slow, Some(CloseCause::Slow))));
            self.rejoin(session, now);
        }
    }

    /// Those that waited for the answer of a member that left may join.
    fn rejoin(&mut self, left: SessionId, now: Instant) {
        for request in self.probes.remove(&left).into_iter().flat_map(|probe| probe.waiting) {
            self.join(request, now);
        }
    }

    /// A session that waits for the answer of a member is over.
    fn withdraw(&mut self, session: SessionId) {
        for probe in self.probes.values_mut() {
            probe.waiting.retain(|request| request.session != session);
        }
    }

    fn keep_changes(&mut self) {
        for Change { tenant, key, address } in self.tenants.take_changes() {
            self.kept.note((tenant, key), address);
        }
        if self.kept.needs_full_write() {
            for Change { tenant, key, address } in self.tenants.addresses() {
                self.kept.note((tenant, key), address);
            }
        }
        self.metrics.set(self.tenants.counts());
    }

    /// The addresses of the members stay on the disk, so that they get them again.
    fn stop(self) {
        let waiting = self.probes.into_values().flat_map(|probe| probe.waiting).map(|request| request.link);
        for link in self.members.into_values().map(|member| member.link).chain(waiting) {
            let _ = link.end.send(CloseCause::Stopping);
        }
    }
}

impl JoinRequest {
    fn refuse(self, cause: CloseCause) {
        // It may have ended by itself.
        let _ = self.link.end.send(cause);
    }
}

impl Broadcast {
    fn announcement(member: &Member) -> Self {
        let [plain, with_endpoints] = [Form::Plain, Form::WithEndpoints].map(|form| announcement(member, form).into());
        Self { plain, with_endpoints }
    }

    fn removal(virtual_ip: IpAddr) -> Self {
        let text = ByteString::from(removal(virtual_ip));
        Self { plain: text.clone(), with_endpoints: text }
    }

    fn text(&self, form: Form) -> ByteString {
        match form {
            Form::Plain => self.plain.clone(),
            Form::WithEndpoints => self.with_endpoints.clone(),
        }
    }
}

#[cfg(test)]
mod tests;
