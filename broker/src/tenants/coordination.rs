//! The tenants of one broker, among all brokers of its bus. The coordinator decides for its own sessions and for those
//! of the others; the others follow it. It has no IO and no clock: it receives commands of sessions and frames of
//! brokers, and returns frames for brokers.

use std::collections::{BTreeMap, BTreeSet};
use std::mem::take;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing::{info, warn};
use wgkex_common::config::TenantSettings;
use wgkex_common::wire::lease::{AnnouncedHub, HUB, LeaseMessage, LeaseRequest};
use wgkex_common::{BrokerName, WorkerName};

use crate::fleet::election::Election;
use crate::tenants::authority::{Authority, Registration, Target};
use crate::tenants::close::CloseCause;
use crate::tenants::frame::{
    CoordinatorRequest, Frame, FrameContent, HeldAddress, JoinRequest, SessionId, SessionOrigin, Update,
};
use crate::tenants::hub::TenantHub;
use crate::tenants::metrics::{Leave, Metrics};
use crate::tenants::pool::{TenantCounts, Tenants};
use crate::tenants::problems::TenantProblems;
use crate::tenants::sessions::{SessionLink, Sessions};
use crate::tenants::streams::{BrokerStream, Numbered};

/// How long a session may wait for an address: for longer than a member with its key is asked whether it is alive. The
/// rest of 5 s is for the close frame.
const COORDINATOR_ANSWER_TIMEOUT: Duration = Duration::from_millis(4500);
/// How long a broker's members stay while it is offline.
const FOLLOWER_ABSENCE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a broker that is online may send no frame. The members of a coordinator that stands still leave after twice
/// this and the time for registrations: within 40 s.
const FRAME_SILENCE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long changes are not published to the hub after the bus is connected again.
const HUB_PAUSE: Duration = Duration::from_secs(5);
/// How often sessions are registered at most.
const REGISTER_INTERVAL: Duration = Duration::from_secs(1);
/// Sessions and addresses that a broker registers at most.
const REGISTERED_MAX: usize = 200_000;

/// The tenants as this broker knows them.
#[derive(Debug)]
pub struct Coordination {
    own: BrokerName,
    settings: TenantSettings,
    sessions: Sessions,
    election: Election,
    role: TenantRole,
    last_epoch: u64,
    frames: Vec<(BrokerName, Frame)>,
    /// When [`Self::tick`] was last called.
    ticked: Option<Instant>,
    /// Until when changes are not published to the hub: other brokers may not have registered again.
    hub_pause: Option<Instant>,
    problems: Arc<Mutex<TenantProblems>>,
    metrics: Metrics,
}

/// The role of this broker for the tenants.
#[derive(Debug)]
enum TenantRole {
    /// The role is not known yet: sessions wait.
    Starting,
    /// It gives the addresses.
    Coordinator { authority: Box<Authority>, followers: BTreeMap<BrokerName, Follower> },
    /// Another broker gives the addresses.
    Follower {
        coordinator: BrokerName,
        stream: BrokerStream<CoordinatorRequest>,
        registered: Instant,
        /// Since when it does not answer, which is logged.
        silent_since: Option<Instant>,
    },
}

/// A broker that follows this one.
#[derive(Debug)]
struct Follower {
    stream: BrokerStream<Update>,
    state: FollowerState,
    absent_since: Option<Instant>,
}

#[derive(Debug)]
enum FollowerState {
    /// The part of its registration that was received.
    Registering(Registration),
    /// It is to get a snapshot; updates for all brokers are sent to it after that.
    Registered,
    /// It has a snapshot.
    Current,
}

impl Follower {
    /// Passes on an update.
    fn push(&mut self, update: &Update, is_for_all: bool) {
        if *update == Update::Snapshot {
            self.state = FollowerState::Current;
        }
        let is_due = match self.state {
            FollowerState::Registering(_) => false,
            FollowerState::Registered => !is_for_all,
            FollowerState::Current => true,
        };
        if is_due {
            self.stream.push(update.clone());
        }
    }
}

impl Coordination {
    /// The coordination of this broker, whose election and sessions have just begun. `epoch` is larger than in any run
    /// before.
    pub fn new(
        own: BrokerName,
        settings: TenantSettings,
        sessions: Sessions,
        election: Election,
        epoch: u64,
        problems: Arc<Mutex<TenantProblems>>,
        metrics: Metrics,
    ) -> Self {
        Self {
            own,
            settings,
            sessions,
            election,
            role: TenantRole::Starting,
            last_epoch: epoch,
            frames: Vec::new(),
            ticked: None,
            hub_pause: None,
            problems,
            metrics,
        }
    }

    /// The election among the brokers.
    pub fn election(&mut self) -> &mut Election {
        &mut self.election
    }

    /// A session wants to be a member.
    pub fn join(&mut self, join_request: JoinRequest, link: SessionLink, now: Instant) {
        if !link.queue.is_closed() && self.sessions.insert(join_request.clone(), link, now) {
            self.request(CoordinatorRequest::Join(join_request), now);
        }
    }

    /// A session is over.
    pub fn leave(&mut self, session: SessionId, leave: Leave, now: Instant) {
        if self.sessions.remove(session, leave) {
            self.request(CoordinatorRequest::Leave(session), now);
        }
    }

    /// A session answered a probe.
    pub fn alive(&mut self, session: SessionId, now: Instant) {
        self.request(CoordinatorRequest::Alive(session), now);
    }

    /// A frame of another broker was received.
    pub fn on_frame(&mut self, frame: Frame, now: Instant) {
        let Frame { from, epoch, number, content } = frame;
        match (&mut self.role, content) {
            (TenantRole::Coordinator { .. }, FrameContent::Requests(items)) => {
                self.on_requests(from, Numbered { epoch, number, items }, now);
            }
            (TenantRole::Follower { coordinator, stream, silent_since, .. }, FrameContent::Updates(items))
                if *coordinator == from && stream.epoch() == epoch =>
            {
                *silent_since = None;
                if stream.receive(number, now) {
                    self.apply(items);
                } else {
                    self.register(now);
                }
            }
            (TenantRole::Follower { coordinator, stream, .. }, FrameContent::Unknown)
                if *coordinator == from && stream.epoch() == epoch =>
            {
                self.register(now);
            }
            _ => {}
        }
    }

    /// A worker announced its hub, or withdrew it.
    pub fn on_hub(&mut self, worker: &WorkerName, announced: Option<AnnouncedHub>, now: Instant) {
        let Some(hub) = self.sessions.hub() else { return };
        let is_changed = hub.on_announced(worker, announced);
        self.problems.lock().hub = hub.problem().map(|problem| (hub.worker().clone(), problem));
        if is_changed {
            for request in self.sessions.on_hub_change() {
                self.request(request, now);
            }
        }
    }

    /// A worker requests the addresses that its hub lacks.
    pub fn on_lease_request(&mut self, worker: &WorkerName, request: &LeaseRequest) {
        if request.to == self.own && request.server == HUB {
            self.sessions.hub().into_iter().for_each(|hub| hub.on_request(worker, request.known));
        }
    }

    /// The connection to the bus is up, or lost.
    pub fn on_bus(&mut self, is_up: bool, now: Instant) {
        self.election.on_bus(is_up, now);
        if !is_up {
            self.hub_pause = Some(now + HUB_PAUSE);
        }
    }

    /// The messages for the worker that is the hub. While others' sessions are not known they wait.
    pub fn take_hub_messages(&mut self, now: Instant) -> Option<(WorkerName, Vec<LeaseMessage>)> {
        let is_settled = match &self.role {
            TenantRole::Coordinator { authority, .. } => authority.is_settled(now),
            TenantRole::Starting | TenantRole::Follower { .. } => false,
        };
        let is_paused = self.hub_pause.is_some_and(|until| now < until);
        let hub = self.sessions.hub().filter(|_| is_settled && !is_paused)?;
        let messages = hub.take_messages(now);
        (!messages.is_empty()).then(|| (hub.worker().clone(), messages))
    }

    /// Handles time limits, and changes this broker's role if the election has another result now.
    pub fn tick(&mut self, now: Instant) {
        let before = self.ticked.replace(now);
        if before.is_some_and(|before| now.saturating_duration_since(before) >= FRAME_SILENCE_TIMEOUT) {
            self.election.rank_last();
        }
        self.elect(now);
        self.tick_followers(now);
        if let TenantRole::Coordinator { authority, .. } = &mut self.role {
            authority.set_paused(self.election.is_cut_off(now), now);
            authority.tick(now);
            self.settle(now);
        } else if let TenantRole::Follower { stream, .. } = &self.role
            && now.saturating_duration_since(stream.last_received) >= FRAME_SILENCE_TIMEOUT
        {
            self.on_silence(now);
            self.register(now);
        }
        self.refuse_waiting(now);
        self.warn_of_strangers(now);
    }

    /// Ends sessions that wait for too long: their clients are to join again.
    fn refuse_waiting(&mut self, now: Instant) {
        let Some(then) = now.checked_sub(COORDINATOR_ANSWER_TIMEOUT) else { return };
        for session in self.sessions.waiting(then) {
            self.sessions.end(session, CloseCause::Late);
            self.request(CoordinatorRequest::Leave(session), now);
        }
    }

    /// How many tenants, members and addresses there are, at all brokers.
    pub fn counts(&self) -> TenantCounts {
        match &self.role {
            TenantRole::Coordinator { authority, .. } => authority.counts(),
            TenantRole::Starting | TenantRole::Follower { .. } => self.sessions.counts(),
        }
    }

    /// A damaged database was created again: writes all addresses to it.
    pub fn write_all(&self) {
        self.sessions.write_all();
    }

    /// The frames that are to be sent now.
    pub fn take_frames(&mut self, now: Instant) -> Vec<(BrokerName, Frame)> {
        let mut frames = take(&mut self.frames);
        let own = &self.own;
        let frame = |epoch, number, content| Frame { from: own.clone(), epoch, number, content };
        match &mut self.role {
            TenantRole::Starting => {}
            TenantRole::Coordinator { followers, .. } => {
                for (broker, follower) in followers {
                    let numbered = follower.stream.take_frames(now).into_iter();
                    frames.extend(numbered.map(|Numbered { epoch, number, items }| {
                        (broker.clone(), frame(epoch, number, FrameContent::Updates(items)))
                    }));
                }
            }
            TenantRole::Follower { coordinator, stream, .. } => {
                let numbered = stream.take_frames(now).into_iter();
                frames.extend(numbered.map(|Numbered { epoch, number, items }| {
                    (coordinator.clone(), frame(epoch, number, FrameContent::Requests(items)))
                }));
            }
        }
        frames
    }

    /// The broker stops: its members leave, whose addresses stay on the disk. Returns the last frames.
    pub fn stop(mut self, now: Instant) -> Vec<(BrokerName, Frame)> {
        let sessions: Vec<_> = self.sessions.all().map(|(join_request, _)| join_request.session).collect();
        // All end first, so that no member receives the others' leave.
        for session in &sessions {
            self.sessions.end(*session, CloseCause::Stopping);
        }
        for session in sessions {
            self.request(CoordinatorRequest::Leave(session), now);
        }
        self.take_frames(now)
    }

    /// Sends a request to the coordinator.
    fn request(&mut self, request: CoordinatorRequest, now: Instant) {
        match &mut self.role {
            // The coordinator receives all sessions once it is known.
            TenantRole::Starting => {}
            TenantRole::Follower { stream, .. } => stream.push(request),
            TenantRole::Coordinator { authority, .. } => {
                decide(authority, &self.own, request, now);
                self.settle(now);
            }
        }
    }

    /// Passes on the updates of the coordinator, and handles the requests that follow from them.
    fn settle(&mut self, now: Instant) {
        let TenantRole::Coordinator { authority, followers } = &mut self.role else { return };
        loop {
            let updates = authority.take_updates();
            if updates.is_empty() {
                return;
            }
            for (target, update) in updates {
                for (broker, follower) in followers.iter_mut() {
                    if target.is_for(broker) {
                        follower.push(&update, target == Target::All);
                    }
                }
                if target.is_for(&self.own) {
                    for request in self.sessions.apply(update) {
                        decide(authority, &self.own, request, now);
                    }
                }
            }
        }
    }

    /// Updates of the coordinator.
    fn apply(&mut self, updates: Vec<Update>) {
        for request in updates.into_iter().flat_map(|update| self.sessions.apply(update)).collect::<Vec<_>>() {
            if let TenantRole::Follower { stream, .. } = &mut self.role {
                stream.push(request);
            }
        }
    }

    /// Requests of a broker that follows.
    fn on_requests(&mut self, from: BrokerName, frame: Numbered<CoordinatorRequest>, now: Instant) {
        let is_peer = self.election.peers(now).any(|(peer, _)| *peer == from);
        let TenantRole::Coordinator { authority, followers } = &mut self.role else { return };
        if !is_peer {
            return;
        }
        let Numbered { epoch, number, items } = frame;
        let is_known = |follower: &Follower| follower.stream.epoch() == epoch;
        if number == 0 && !followers.get(&from).is_some_and(is_known) {
            let state = FollowerState::Registering(Registration::default());
            followers
                .insert(from.clone(), Follower { stream: BrokerStream::new(epoch, now), state, absent_since: None });
        }
        let follower = followers.get_mut(&from).filter(|follower| is_known(follower));
        let Some(follower) = follower.and_then(|follower| follower.stream.receive(number, now).then_some(follower))
        else {
            let content = FrameContent::Unknown;
            self.frames.push((from, Frame { from: self.own.clone(), epoch, number: 0, content }));
            return;
        };
        for request in items {
            match (&mut follower.state, request) {
                (FollowerState::Registering(registration), CoordinatorRequest::Session(join_request, address)) => {
                    registration.sessions.push((join_request, address));
                }
                (FollowerState::Registering(registration), CoordinatorRequest::Held(held)) => {
                    registration.held.push(held);
                }
                (FollowerState::Registering(registration), CoordinatorRequest::Registered) => {
                    let registration = take(registration);
                    follower.state = FollowerState::Registered;
                    authority.register(&from, registration, now);
                }
                (FollowerState::Registering(_), _) => {}
                (FollowerState::Registered | FollowerState::Current, request) => decide(authority, &from, request, now),
            }
        }
        if let FollowerState::Registering(Registration { sessions, held }) = &follower.state {
            authority.expect(&from, now);
            if sessions.len() + held.len() > REGISTERED_MAX {
                followers.remove(&from);
            }
        }
        self.settle(now);
    }

    /// Takes the role that follows from the election.
    pub fn elect(&mut self, now: Instant) {
        let Some(coordinator) = self.election.elected(now).cloned() else { return };
        let is_same = match &self.role {
            TenantRole::Starting => false,
            TenantRole::Coordinator { .. } => coordinator == self.own,
            TenantRole::Follower { coordinator: current, .. } => coordinator == *current,
        };
        if is_same {
            return;
        }
        info!(broker = coordinator.as_str(), "the addresses of all tenants are given by this broker");
        self.metrics.coordinator.set(i64::from(coordinator == self.own));
        if coordinator == self.own {
            self.coordinate(now);
        } else {
            self.sessions.hub().into_iter().for_each(TenantHub::follow);
            let stream = BrokerStream::new(self.last_epoch, now);
            self.role = TenantRole::Follower { coordinator, stream, registered: now, silent_since: None };
            self.begin_epoch(now);
        }
    }

    /// This broker becomes the coordinator, with all members and addresses that it knows from the one before.
    fn coordinate(&mut self, now: Instant) {
        let TenantSettings { networks, grace, .. } = &self.settings;
        let tenants = Tenants::new(networks, *grace);
        let others = self.election.peers(now).map(|(name, _)| name.clone()).collect();
        let mut authority = Box::new(Authority::new(tenants, others, now));
        for (tenant, origin, member) in self.sessions.members() {
            authority.take_over(tenant, origin, member, now);
        }
        for held in held(&self.sessions) {
            authority.hold(&held, now);
        }
        let sessions = self.sessions.all().map(|(join_request, address)| (join_request.clone(), address)).collect();
        authority.register(&self.own, Registration { sessions, held: Vec::new() }, now);
        let known = self.sessions.addresses().len();
        self.sessions.forget_partial();
        self.role = TenantRole::Coordinator { authority, followers: BTreeMap::new() };
        self.last_epoch += 1;
        let id = self.last_epoch;
        self.sessions.hub().into_iter().for_each(|hub| hub.lead(id));
        self.settle(now);
        let lost = known.saturating_sub(self.sessions.addresses().len());
        if lost > 0 {
            warn!(
                addresses = lost,
                "addresses of tenants are given up: they do not fit tenants.pool and tenants.tenant_length"
            );
        }
    }

    /// Registers the sessions with the coordinator again, if that was not done just now.
    fn register(&mut self, now: Instant) {
        if let TenantRole::Follower { registered, .. } = &self.role
            && now.saturating_duration_since(*registered) >= REGISTER_INTERVAL
        {
            self.begin_epoch(now);
        }
    }

    /// A coordinator that does not answer the next registration either is passed over.
    fn on_silence(&mut self, now: Instant) {
        let TenantRole::Follower { coordinator, silent_since, .. } = &mut self.role else { return };
        match silent_since {
            None => {
                *silent_since = Some(now);
                warn!(
                    broker = coordinator.as_str(),
                    "the broker that gives the addresses of tenants does not answer: may this broker's MQTT user publish on \
                     wgkex/broker/+/tenants? (wgkex-broker mqtt-acl)"
                );
            }
            Some(since) if now.saturating_duration_since(*since) >= FRAME_SILENCE_TIMEOUT => {
                self.election.skip_broker(coordinator);
            }
            Some(_) => {}
        }
    }

    fn begin_epoch(&mut self, now: Instant) {
        let TenantRole::Follower { stream, registered, .. } = &mut self.role else { return };
        self.last_epoch += 1;
        *stream = BrokerStream::new(self.last_epoch, now);
        *registered = now;
        stream.push(CoordinatorRequest::Register);
        for (join_request, address) in self.sessions.all() {
            stream.push(CoordinatorRequest::Session(join_request.clone(), address));
        }
        for held in held(&self.sessions) {
            stream.push(CoordinatorRequest::Held(held));
        }
        stream.push(CoordinatorRequest::Registered);
        self.sessions.forget_partial();
    }

    /// Removes the followers that are offline or silent for too long, with their members.
    fn tick_followers(&mut self, now: Instant) {
        let TenantRole::Coordinator { authority, followers } = &mut self.role else { return };
        let peers: BTreeSet<_> = self.election.peers(now).map(|(name, _)| name).collect();
        let is_over = |since: Instant, timeout| now.saturating_duration_since(since) >= timeout;
        followers.retain(|broker, follower| {
            follower.absent_since = if peers.contains(broker) { None } else { follower.absent_since.or(Some(now)) };
            let is_gone = follower.absent_since.is_some_and(|since| is_over(since, FOLLOWER_ABSENCE_TIMEOUT))
                || is_over(follower.stream.last_received, FRAME_SILENCE_TIMEOUT);
            if is_gone {
                info!(broker = broker.as_str(), "the members of tenants at this broker are gone with it");
                authority.broker_gone(broker, now);
            }
            !is_gone
        });
    }

    fn warn_of_strangers(&mut self, now: Instant) {
        let with_other_rules: BTreeSet<_> = self.election.with_other_rules(now).cloned().collect();
        let mut problems = self.problems.lock();
        for broker in with_other_rules.difference(&problems.with_other_rules) {
            warn!(
                broker = broker.as_str(),
                "another broker has other tenants.pool, tenant_length, grace or hub: its members and those here do not see each other"
            );
        }
        problems.with_other_rules = with_other_rules;
    }
}

impl Target {
    fn is_for(&self, broker: &BrokerName) -> bool {
        match self {
            Self::All => true,
            Self::Broker(target) => target == broker,
        }
    }
}

/// The addresses that are known, members' among them.
fn held(sessions: &Sessions) -> impl Iterator<Item = HeldAddress> {
    let held = |((tenant, key), address): (&(_, _), &_)| (Clone::clone(tenant), *key, *address);
    sessions.addresses().iter().map(held).map(|(tenant, key, address)| HeldAddress { tenant, key, address })
}

/// The coordinator decides about a request of a broker.
fn decide(authority: &mut Authority, broker: &BrokerName, request: CoordinatorRequest, now: Instant) {
    let origin = |session| SessionOrigin { broker: broker.clone(), session };
    match request {
        CoordinatorRequest::Join(join_request) => authority.join(broker, join_request, now),
        CoordinatorRequest::Leave(session) => authority.leave(&origin(session), now),
        CoordinatorRequest::Alive(session) => authority.alive(&origin(session)),
        CoordinatorRequest::Register
        | CoordinatorRequest::Session(..)
        | CoordinatorRequest::Held(_)
        | CoordinatorRequest::Registered => {}
    }
}

#[cfg(test)]
mod tests;
