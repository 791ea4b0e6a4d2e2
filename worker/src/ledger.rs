//! What is remembered of a domain's peers from one read of its tables to the next: when their keys came, how
//! long they have been quiet by the monotonic clock, and which keys are still owed to the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;
use std::time::{Duration, Instant, SystemTime};

use wgkex_common::PublicKey;
use wgkex_common::message::Age;
use wgkex_common::store::Kept;
pub use wgkex_common::store::Now;

use crate::kernel::{Change, Device, Peer};
use crate::plan::{self, Shape, Step};

/// How often a key that the kernel refuses is tried: with the schedule's growing pauses, for some minutes.
const TRIES: u8 = 8;

/// What has no peer goes when it had none for this long: somebody may be making one.
const ORPHANED: Duration = Duration::from_secs(30);

/// When peers are stale, and how often that is looked for (contract sections 4 and 7).
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// A peer is stale without a handshake for this long.
    pub stale: Duration,
    /// It is not stale this long after its key came, or was found in the kernel, or was put back into it.
    pub grace: Duration,
    /// Stale peers are looked for this often.
    pub interval: Duration,
    /// A peer is connected if its last handshake is younger than this.
    pub connected: Duration,
    /// Peers are counted, and what is missing is restored, this often.
    pub count: Duration,
    /// The handshakes of a peer are reported again after this long.
    pub report: Duration,
    /// So many keys wait at most for their interfaces; the oldest go first.
    pub waiting: usize,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            stale: Duration::from_secs(10_800),
            grace: Duration::from_secs(600),
            interval: Duration::from_secs(3_600),
            connected: Duration::from_secs(180),
            count: Duration::from_secs(60),
            report: Duration::from_secs(21_600),
            waiting: 200_000,
        }
    }
}

/// What a peer does. Every peer is in one of these states, also those that wgkex did not make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PeerState {
    /// It shook hands in the last [`Policy::connected`].
    Connected,
    /// It shook hands, longer ago than that, but within [`Policy::stale`].
    Idle,
    /// It did not, but is within its grace.
    Pending,
    /// It did not, and its grace is over: if wgkex made it, the next sweep takes it.
    Stale,
}

/// How many peers of an interface are in each state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// In [`PeerState::Connected`].
    pub connected: u64,
    /// In [`PeerState::Idle`].
    pub idle: u64,
    /// In [`PeerState::Pending`].
    pub pending: u64,
    /// In [`PeerState::Stale`].
    pub stale: u64,
}

/// The memory of one domain: 100 to 170 bytes per peer, beside the 180 of the tables while they are read.
#[derive(Debug)]
pub struct Ledger {
    policy: Policy,
    /// Of the last read; `None` while an interface is missing, and before the first read.
    indexes: Option<(u32, u32)>,
    last_read: Option<Instant>,
    /// The peers of the interface, as last read and with what was applied since.
    peers: BTreeMap<PublicKey, Entry>,
    /// Keys that came and do not stand whole. One may be in `peers` too.
    waiting: BTreeMap<PublicKey, Waiting>,
    /// Addresses that peers have which others made.
    foreign: BTreeSet<Ipv6Addr>,
    /// Since when an address has a route or a flood entry without a peer.
    orphans: BTreeMap<Ipv6Addr, Instant>,
    /// Keys that are not as they were when this was last asked for.
    changed: BTreeSet<PublicKey>,
}

#[derive(Debug)]
struct Entry {
    arrived: Instant,
    handshake: Option<Handshake>,
    reported: Option<Instant>,
    ours: bool,
}

#[derive(Debug, Clone, Copy)]
struct Handshake {
    /// As the kernel says it; only ever compared with what it said before.
    at: SystemTime,
    /// When that was by the monotonic clock.
    quiet_since: Instant,
}

#[derive(Debug, Clone, Copy)]
struct Waiting {
    arrived: Instant,
    tries: u8,
    /// It came as a key of its own, and not from the last run of this program, or as one that is live elsewhere.
    announced: bool,
}

impl Ledger {
    /// Remembers nothing yet.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            indexes: None,
            last_read: None,
            peers: BTreeMap::new(),
            waiting: BTreeMap::new(),
            foreign: BTreeSet::new(),
            orphans: BTreeMap::new(),
            changed: BTreeSet::new(),
        }
    }

    /// Remembers, before the first read, a key that the last run of this program had: if the kernel lacks it, it is owed.
    pub fn remember(&mut self, key: PublicKey, kept: Kept) {
        self.waiting.insert(key, Waiting { arrived: kept.last, tries: 0, announced: false });
    }

    /// Takes in a read of the tables.
    ///
    /// A peer of ours that vanished from an interface that is still the same was removed by hand and is
    /// forgotten; if the interface was made anew, or was missing meanwhile, its key is owed again.
    pub fn observe(&mut self, device: &Device, now: Now) {
        if self.last_read.is_some() && self.indexes != Some(device.indexes) {
            self.owe_vanished(device);
        }
        // A peer that stands, or that somebody altered meanwhile, is not what an old word of it is about.
        self.waiting.retain(|key, waiting| {
            let shape = || device.peers.get(key).map(|peer| plan::shape(key, peer));
            waiting.announced || matches!(shape(), None | Some(Shape::Bare))
        });
        let changed = &mut self.changed;
        self.peers.retain(|key, _| {
            let stays = device.peers.contains_key(key);
            if !stays {
                changed.insert(*key);
            }
            stays
        });
        if self.peers.is_empty() {
            // Made at once a map has full nodes; filled in order, one by one, it takes twice the memory.
            self.peers = device.peers.keys().map(|key| (*key, Entry::new(now.monotonic, false))).collect();
        }
        let since_last_read = self.last_read.map(|read| now.monotonic.saturating_duration_since(read));
        for (key, peer) in &device.peers {
            let entry = self.peers.entry(*key).or_insert_with(|| Entry::new(now.monotonic, false));
            let before = (entry.ours, entry.handshake.is_some());
            entry.observe(key, peer, now, since_last_read);
            if before != (entry.ours, entry.handshake.is_some()) {
                self.changed.insert(*key);
            }
        }
        self.foreign = plan::foreign(device);
        let orphans = plan::orphans(device);
        self.orphans.retain(|address, _| orphans.contains(address));
        for address in orphans {
            self.orphans.entry(address).or_insert(now.monotonic);
        }
        self.indexes = Some(device.indexes);
        self.last_read = Some(now.monotonic);
    }

    fn owe_vanished(&mut self, device: &Device) {
        for (key, entry) in &self.peers {
            if entry.ours && !device.peers.contains_key(key) {
                let waiting = Waiting { arrived: entry.arrived, tries: 0, announced: false };
                self.waiting.entry(*key).or_insert(waiting);
            }
        }
    }

    /// An interface is missing, so that nothing known of the tables holds.
    pub fn lost(&mut self) {
        self.indexes = None;
    }

    /// What is to be set: keys that wait, in full and in order of arrival, and what peers of ours lack. Keys that
    /// would not stand, or would take the address of a key that came later, wait no longer.
    pub fn owed(&mut self, device: &Device) -> Vec<Step> {
        self.drop_outlived(device);
        let plan::Install { mut steps, refused } = plan::install(self.oldest_first(), device.public_key);
        for (key, _) in refused {
            self.forget_waiting(&key);
        }
        let standing = self.peers.iter().filter(|(key, entry)| entry.ours && !self.waiting.contains_key(key));
        steps.extend(plan::repair(device, standing.map(|(key, _)| *key)));
        steps
    }

    fn drop_outlived(&mut self, device: &Device) {
        if self.waiting.is_empty() {
            return;
        }
        let (peers, holders) = (&self.peers, plan::holders(device));
        let outlived = |key: &PublicKey, waiting: &Waiting| {
            let holder = holders.get(&key.link_local()).filter(|holder| *holder != key);
            holder.and_then(|holder| peers.get(holder)).is_some_and(|holder| holder.arrived > waiting.arrived)
        };
        let outlived: Vec<_> =
            self.waiting.iter().filter(|(key, waiting)| outlived(key, waiting)).map(|(key, _)| *key).collect();
        for key in &outlived {
            self.forget_waiting(key);
        }
    }

    fn forget_waiting(&mut self, key: &PublicKey) {
        self.waiting.remove(key);
        self.changed.insert(*key);
    }

    fn oldest_first(&self) -> Vec<PublicKey> {
        let mut waiting: Vec<_> = self.waiting.iter().map(|(key, waiting)| (waiting.arrived, *key)).collect();
        waiting.sort_unstable();
        waiting.into_iter().map(|(_, key)| key).collect()
    }

    /// Removes what has had no peer for a while.
    #[must_use]
    pub fn orphaned(&self, device: &Device, now: Instant) -> Vec<Change> {
        let old = self.orphans.iter().filter(|(_, since)| now.saturating_duration_since(**since) >= ORPHANED);
        plan::clear(device, &old.map(|(address, _)| *address).collect())
    }

    /// Which of the live `keys` have no peer here, do not wait for one, would take no address from a peer, and would not be
    /// stale at once. They are owed from now on, the oldest first.
    pub fn learn(&mut self, keys: impl IntoIterator<Item = (PublicKey, Age)>, now: Instant) -> Vec<PublicKey> {
        let policy = &self.policy;
        let dead = |Age(age, proven): Age| {
            // What shakes hands is reported every so often; what never did has its grace alone.
            let quiet = if proven { policy.report + policy.stale } else { policy.grace };
            Duration::from_secs(age) >= quiet
        };
        let unknown = |key: &PublicKey| !self.peers.contains_key(key) && !self.waiting.contains_key(key);
        let mut lacking: Vec<_> =
            keys.into_iter().filter(|(key, age)| unknown(key) && !dead(*age)).map(|(key, age)| (age.0, key)).collect();
        if lacking.is_empty() {
            return Vec::new();
        }
        let addresses: BTreeSet<_> = lacking.iter().map(|(_, key)| key.link_local()).collect();
        let derived = self.peers.keys().chain(self.waiting.keys()).map(PublicKey::link_local);
        let taken: BTreeSet<_> =
            derived.chain(self.foreign.iter().copied()).filter(|address| addresses.contains(address)).collect();
        lacking.retain(|(_, key)| !taken.contains(&key.link_local()));
        lacking.sort_unstable_by(|a, b| b.cmp(a));
        for (age, key) in &lacking {
            let arrived = now.checked_sub(Duration::from_secs(*age)).unwrap_or(now);
            self.waiting.insert(*key, Waiting { arrived, tries: 0, announced: false });
            self.changed.insert(*key);
        }
        lacking.into_iter().map(|(_, key)| key).collect()
    }

    /// All keys, as if each had changed.
    pub fn change_all(&mut self) {
        self.changed.extend(self.peers.keys().chain(self.waiting.keys()));
    }

    /// The peers of ours that shook hands and were not reported for [`Policy::report`], or since [`Self::report_all`].
    /// They count as reported from now on.
    pub fn unreported(&mut self, now: Instant) -> Vec<PublicKey> {
        let policy = self.policy;
        let due = |entry: &Entry| {
            let long_ago = |at: Instant| now.saturating_duration_since(at) >= policy.report;
            entry.ours && entry.reported.is_none_or(long_ago) && entry.state(&policy, now) == PeerState::Connected
        };
        let due = self.peers.iter_mut().filter(|(_, entry)| due(entry));
        due.map(|(key, entry)| {
            entry.reported = Some(now);
            *key
        })
        .collect()
    }

    /// What was reported may not have been heard.
    pub fn report_all(&mut self) {
        self.peers.values_mut().for_each(|entry| entry.reported = None);
    }

    /// The keys that are not as they were when this was last called, and what to remember of each; none if it is gone.
    pub fn take_changed(&mut self) -> Vec<(PublicKey, Option<Kept>)> {
        let changed = std::mem::take(&mut self.changed);
        changed.into_iter().map(|key| (key, self.kept(&key))).collect()
    }

    fn kept(&self, key: &PublicKey) -> Option<Kept> {
        let standing = self.peers.get(key).filter(|entry| entry.ours);
        let arrived = standing.map(|entry| entry.arrived).or_else(|| Some(self.waiting.get(key)?.arrived))?;
        let proven = standing.is_some_and(|entry| entry.handshake.is_some());
        Some(Kept { last: arrived, proven })
    }

    /// The peers of ours that are stale, judged by the last read.
    #[must_use]
    pub fn stale(&self, now: Instant) -> BTreeSet<PublicKey> {
        let stale = |entry: &Entry| entry.ours && entry.state(&self.policy, now) == PeerState::Stale;
        self.peers.iter().filter(|(_, entry)| stale(entry)).map(|(key, _)| *key).collect()
    }

    /// How many peers are in which state, judged by the last read.
    #[must_use]
    pub fn counts(&self, now: Instant) -> Counts {
        let mut counts = Counts::default();
        for entry in self.peers.values() {
            *match entry.state(&self.policy, now) {
                PeerState::Connected => &mut counts.connected,
                PeerState::Idle => &mut counts.idle,
                PeerState::Pending => &mut counts.pending,
                PeerState::Stale => &mut counts.stale,
            } += 1;
        }
        counts
    }

    /// Whether `key` waits, its earlier arrival not having come to stand whole.
    #[must_use]
    pub fn waits(&self, key: &PublicKey) -> bool {
        self.waiting.contains_key(key)
    }

    /// Whether somebody may wait for a word on `key`, which came and did not come to stand.
    #[must_use]
    pub fn is_announced(&self, key: &PublicKey) -> bool {
        self.waiting.get(key).is_some_and(|waiting| waiting.announced)
    }

    /// `key` stands whole in the kernel and has its grace from `now`. Says whether it is new there.
    pub fn stands(&mut self, key: PublicKey, now: Instant) -> bool {
        let waited = self.waiting.remove(&key).is_some();
        let known = self.peers.contains_key(&key);
        self.changed.insert(key);
        self.peers.entry(key).or_insert_with(|| Entry::new(now, true)).arrived = now;
        waited || !known
    }

    /// `key` came and does not stand whole: it is owed. Says how many older ones that made too many.
    pub fn wants(&mut self, key: PublicKey, now: Instant) -> usize {
        self.waiting.insert(key, Waiting { arrived: now, tries: 0, announced: true });
        self.changed.insert(key);
        if self.waiting.len() <= self.policy.waiting { 0 } else { self.drop_oldest() }
    }

    /// A sixteenth at once, so that a flood does not cost a search per key.
    fn drop_oldest(&mut self) -> usize {
        let surplus = self.waiting.len() - self.policy.waiting + self.policy.waiting / 16;
        let oldest = self.oldest_first();
        oldest.iter().take(surplus).for_each(|key| self.forget_waiting(key));
        surplus.min(oldest.len())
    }

    /// The kernel refused `key` once more; too often, and it is given up.
    pub fn refused(&mut self, key: &PublicKey) {
        let Some(waiting) = self.waiting.get_mut(key) else { return };
        waiting.tries += 1;
        if waiting.tries >= TRIES {
            self.forget_waiting(key);
        }
    }

    /// Forgets the keys that wait and that `expels` names; returns the peers that it names, and whether each is ours.
    pub fn expel(&mut self, expels: impl Fn(&PublicKey) -> bool) -> BTreeMap<PublicKey, bool> {
        let waiting: Vec<_> = self.waiting.keys().filter(|key| expels(key)).copied().collect();
        for key in &waiting {
            self.forget_waiting(key);
        }
        self.peers.iter().filter(|(key, _)| expels(key)).map(|(key, entry)| (*key, entry.ours)).collect()
    }

    /// Whether `key` has a peer of ours, as last read, or waits for one.
    #[must_use]
    pub fn knows(&self, key: &PublicKey) -> bool {
        self.waiting.contains_key(key) || self.peers.get(key).is_some_and(|entry| entry.ours)
    }

    /// `key` was removed from the kernel.
    pub fn removed(&mut self, key: &PublicKey) {
        self.peers.remove(key);
        self.changed.insert(*key);
    }
}

impl Entry {
    fn new(arrived: Instant, ours: bool) -> Self {
        Self { arrived, handshake: None, reported: None, ours }
    }

    fn observe(&mut self, key: &PublicKey, peer: &Peer, now: Now, since_last_read: Option<Duration>) {
        self.ours = match plan::shape(key, peer) {
            Shape::Ours => true,
            Shape::Bare => self.ours,
            Shape::Foreign => false,
        };
        match (peer.last_handshake, self.handshake) {
            (Some(at), Some(known)) if at == known.at => {}
            (Some(at), _) => self.handshake = Some(Handshake::first_seen(at, now, since_last_read)),
            (None, Some(_)) => *self = Self::new(now.monotonic, self.ours),
            (None, None) => {}
        }
    }

    fn state(&self, policy: &Policy, now: Instant) -> PeerState {
        let idle = self.handshake.map(|handshake| now.saturating_duration_since(handshake.quiet_since));
        match idle {
            Some(idle) if idle < policy.connected => PeerState::Connected,
            Some(idle) if idle < policy.stale => PeerState::Idle,
            _ if now.saturating_duration_since(self.arrived) < policy.grace => PeerState::Pending,
            _ => PeerState::Stale,
        }
    }
}

impl Handshake {
    /// A handshake that the last read did not show is no older than that read, whatever the wall clock says.
    fn first_seen(at: SystemTime, now: Now, since_last_read: Option<Duration>) -> Self {
        let by_wall = now.wall.duration_since(at).unwrap_or_default();
        let ago = since_last_read.map_or(by_wall, |longest| by_wall.min(longest));
        Self { at, quiet_since: now.monotonic.checked_sub(ago).unwrap_or(now.monotonic) }
    }
}

#[cfg(test)]
mod tests;
