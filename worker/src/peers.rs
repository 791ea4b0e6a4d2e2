//! What is remembered of a domain's peers from one read of its tables to the next: when their keys came, how
//! long they have been quiet by the monotonic clock, and which keys are still owed to the kernel.

mod compact_instant;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use wgkex_common::access_lists::Admission;
use wgkex_common::address::claim::{Claim, ClaimState};
pub use wgkex_common::storage::key_store::Clocks;
use wgkex_common::storage::key_store::KeyRecord;
use wgkex_common::wire::message::Age;
use wgkex_common::{Derived, PublicKey, Reserved};

use self::compact_instant::Stamp;
use crate::plan::{self, ADDRESS_TAKEN, FULL, OWN_KEY, RESERVED, Shape, Step};
use wgkex_kernel::{Change, Device, Peer};

/// How often a key that the kernel refuses is tried: with the schedule's growing pauses, for some minutes.
const TRIES: u8 = 8;

/// Where one of the peers that never shook hands has to go for a new key, this part of them goes with it: the keys that
/// come next have room at once, without a read for each.
const PORTION: usize = 16;

/// Where this part is fewer than these, none goes with it.
const PORTION_MIN: usize = 4;

/// For so many keys that wait, or for as many as that part is, others go at once.
const AT_ONCE: usize = 64;

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
    /// Tables are read, peers counted, and what is missing is restored, this often.
    pub count: Duration,
    /// The handshakes of a peer are reported again after this long.
    pub report: Duration,
    /// So many keys wait at most for their interfaces; the oldest go first.
    pub waiting: usize,
    /// So many peers that never shook hands an interface has at most; the oldest go first.
    pub unproven: usize,
    /// A peer that was silent for this long forgets where its router was; none never do.
    pub forget: Option<Duration>,
    /// So many peers of any kind an interface has at most; no new one is set beyond.
    pub peers: usize,
}

impl Policy {
    /// How long a handshake at another gateway counts: what shakes hands there is reported every so often.
    fn vouched(&self) -> Duration {
        self.report + self.stale
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            stale: Duration::from_secs(10_800),
            grace: Duration::from_secs(600),
            interval: Duration::from_secs(3_600),
            connected: Duration::from_secs(180),
            // What vanished is to be back within a minute, and takes seconds with very many peers.
            count: Duration::from_secs(45),
            report: Duration::from_secs(21_600),
            waiting: 200_000,
            forget: None,
            unproven: 30_000,
            peers: 100_000,
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
    /// What was known of peers of ours that vanished. Their keys wait.
    vanished: BTreeMap<PublicKey, Entry>,
    /// Which key, of a peer or waiting, has each address.
    owners: BTreeMap<Derived, PublicKey>,
    /// Peers of ours whose address another key has: the next read takes them.
    ousted: BTreeSet<PublicKey>,
    /// Peers of ours that never shook hands, as far as is known between two reads.
    unproven: usize,
    /// Keys that wait and have a place.
    promised: usize,
    /// Addresses that peers have which others made, and which peers.
    foreign: BTreeMap<Ipv6Addr, PublicKey>,
    /// Who may come; here it counts whom the operators trust.
    admission: Arc<Admission>,
    /// Since when an address has a route or a flood entry without a peer.
    orphans: BTreeMap<Ipv6Addr, Instant>,
    /// Keys that are not as they were when this was last asked for.
    changed: BTreeSet<PublicKey>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// The address that the key derives.
    address: Derived,
    /// When the key came, and when it first did.
    arrived: Stamp,
    first: Stamp,
    handshake: Option<Handshake>,
    /// When it shook hands at another gateway, by a broker's word.
    vouched: Option<Stamp>,
    reported: Option<Stamp>,
    /// The peer was made anew since it last shook hands, if it did: the kernel does not know of that handshake.
    renewed: bool,
    ours: bool,
    /// A broker let it come since this program started.
    came: bool,
}

#[derive(Debug, Clone, Copy)]
struct Handshake {
    /// As the kernel says it, in nanoseconds of its clock; only ever compared with what it said before.
    at: u64,
    /// When that was by the monotonic clock.
    quiet_since: Stamp,
}

#[derive(Debug, Clone, Copy)]
struct Waiting {
    arrived: Stamp,
    /// When it first came.
    first: Stamp,
    tries: u8,
    /// It came as a key of its own, and not from the last run of this program, or as one that is live elsewhere.
    announced: bool,
    /// When it shook hands at another gateway, by a broker's word.
    vouched: Option<Stamp>,
    /// A place is kept for its peer.
    promised: bool,
    /// A broker let it come since this program started.
    came: bool,
}

/// Live keys that a gateway lacks.
#[derive(Debug, PartialEq, Eq)]
pub struct Learnt {
    /// How many.
    pub number: usize,
    /// Those that can be set before the next read, the oldest first.
    pub next: Vec<PublicKey>,
}

/// For how many more peers there is room.
#[derive(Debug, Clone, Copy)]
struct Room {
    unproven: usize,
    all: usize,
}

impl Room {
    /// Takes the place of a peer, if there is one; what is `vouched` for has its own.
    fn take(&mut self, vouched: bool) -> bool {
        let has_place = self.all > 0 && (vouched || self.unproven > 0);
        if has_place {
            self.all -= 1;
            self.unproven -= usize::from(!vouched);
        }
        has_place
    }
}

/// What becomes of keys that came.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Admitted {
    /// They have peers, and are to be set again.
    pub known: Vec<PublicKey>,
    /// They are to be set, in this order.
    pub new: Vec<PublicKey>,
    /// There is no room for them before the next read.
    pub deferred: Vec<PublicKey>,
    /// They are not to be set, and why: one of [`plan::REFUSALS`].
    pub refused: Vec<(PublicKey, &'static str)>,
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
            vanished: BTreeMap::new(),
            owners: BTreeMap::new(),
            ousted: BTreeSet::new(),
            unproven: 0,
            promised: 0,
            foreign: BTreeMap::new(),
            admission: Arc::default(),
            orphans: BTreeMap::new(),
            changed: BTreeSet::new(),
        }
    }

    /// Takes over whom the operators trust: such a key keeps its peer and its address however long it is silent.
    pub fn obey(&mut self, admission: Arc<Admission>) {
        self.admission = admission;
    }

    /// Remembers, before the first read, a key that the last run of this program had: if the kernel lacks it, it is owed.
    pub fn remember(&mut self, key: PublicKey, kept: KeyRecord) {
        self.waiting.insert(key, Waiting::heard_of(kept.last.into(), kept.proven));
    }

    /// Takes in a read of the tables. Says how many peers of ours vanished from an interface that stayed.
    ///
    /// Whatever made a peer of ours vanish, its key is owed again: only what is [`removed`](Self::removed) is gone. What
    /// is `reserved` is never ours.
    pub fn observe(&mut self, device: &Device, reserved: &Reserved, now: Clocks) -> usize {
        let stayed = self.indexes == Some(device.indexes);
        let vanished = self.take_over(device, now.monotonic);
        // A peer that stands, or that somebody altered meanwhile, is not what an old word of it is about.
        self.waiting.retain(|key, waiting| {
            let shape = || device.peers.get(key).map(|peer| plan::shape(key, peer));
            waiting.announced || matches!(shape(), None | Some(Shape::Bare))
        });
        self.observe_peers(device, reserved, now);
        self.settle_owners(now.monotonic);
        self.waiting.values_mut().for_each(|waiting| waiting.promised = false);
        self.promised = 0;
        self.unproven = self.peers.values().filter(|entry| entry.is_unproven()).count();
        self.observe_orphans(device, reserved, now.monotonic);
        self.indexes = Some(device.indexes);
        self.last_read = Some(now.monotonic);
        if stayed { vanished } else { 0 }
    }

    /// Has an entry for each peer that is there, and for no other. The keys of those that were ours and are not there
    /// wait; says how many.
    fn take_over(&mut self, device: &Device, now: Instant) -> usize {
        let Self { peers, waiting, vanished, changed, .. } = self;
        let mut there = plan::Among::new(device.peers.keys());
        let before = vanished.len();
        peers.retain(|key, entry| {
            let stays = there.has(key);
            if !stays {
                changed.insert(*key);
            }
            if !stays && entry.ours {
                waiting.entry(*key).or_insert(Waiting::again(entry));
                vanished.insert(*key, *entry);
            }
            stays
        });
        let gone = vanished.len() - before;
        let mut found = |key: &PublicKey| match (vanished.remove(key), waiting.get(key)) {
            (Some(entry), _) => entry.made_anew(now),
            (None, Some(Waiting { first, vouched, .. })) => {
                Entry { first: *first, vouched: *vouched, ..Entry::new(key, now, false) }
            }
            (None, None) => Entry::new(key, now, false),
        };
        if peers.is_empty() {
            // Made at once a map has full nodes; filled in order, one by one, it takes twice the memory.
            *peers = device.peers.keys().map(|key| (*key, found(key))).collect();
        } else if peers.len() < device.peers.len() {
            for key in device.peers.keys() {
                peers.entry(*key).or_insert_with(|| found(key));
            }
        }
        gone
    }

    /// Which peers are ours, and which of them shook hands; the entries are those of the same keys.
    fn observe_peers(&mut self, device: &Device, reserved: &Reserved, now: Clocks) {
        let since_last_read = self.last_read.map(|read| now.monotonic.saturating_duration_since(read));
        self.foreign.clear();
        for ((key, peer), entry) in device.peers.iter().zip(self.peers.values_mut()) {
            let before = (entry.ours, entry.handshake.is_some());
            entry.observe(peer, now, since_last_read);
            let address = entry.address.into();
            entry.ours = match plan::shape_at(address, peer) {
                Shape::Ours => {
                    let is_free = !reserved.has_key(key) && !reserved.has_address(&address);
                    is_free || (entry.is_routers() && !reserved.lists(key))
                }
                Shape::Bare => entry.ours,
                Shape::Foreign => {
                    self.foreign.extend(plan::addresses_of(peer).map(|address| (address, *key)));
                    false
                }
            };
            if before != (entry.ours, entry.handshake.is_some()) {
                self.changed.insert(*key);
            }
        }
    }

    fn observe_orphans(&mut self, device: &Device, reserved: &Reserved, now: Instant) {
        let entries = self.peers.values().chain(self.vanished.values());
        let mut derived: Vec<_> = entries.map(|entry| entry.address).collect();
        derived.sort_unstable();
        let mut orphans = plan::orphans(device, &derived);
        orphans.retain(|address| !reserved.has_address(address));
        self.orphans.retain(|address, _| orphans.contains(address));
        for address in orphans {
            self.orphans.entry(address).or_insert(now);
        }
    }

    /// An interface is missing, so that nothing known of the tables holds.
    pub fn lost(&mut self) {
        self.indexes = None;
    }

    /// Which key has which address, with all that the last read showed.
    fn settle_owners(&mut self, now: Instant) {
        self.ousted.clear();
        let ours = self.peers.iter().filter(|(_, entry)| entry.ours).map(|(key, entry)| (entry.address, *key));
        let waiting = self.waiting.keys().map(|key| (key.derived(), *key));
        let mut claimants: Vec<_> = ours.chain(waiting).collect();
        claimants.sort_by_key(|(address, _)| *address);
        let rivals = || claimants.chunk_by(|one, other| one.0 == other.0);
        self.owners = rivals().map(|rivals| rivals[0]).collect();
        for (_, key) in rivals().flat_map(|rivals| &rivals[1..]) {
            self.claim(*key, now);
        }
    }

    /// `key` has its address from now on, unless another has the better claim.
    fn claim(&mut self, key: PublicKey, now: Instant) -> bool {
        let address = key.derived();
        let owner = self.owners.get(&address).copied().filter(|owner| *owner != key);
        if let Some(owner) = owner {
            let loses = !self.claim_of(key, now).precedes(&self.claim_of(owner, now));
            self.yield_address(if loses { key } else { owner });
            if loses {
                return false;
            }
        }
        self.owners.insert(address, key);
        self.ousted.remove(&key);
        true
    }

    /// `key` has lost its address.
    fn yield_address(&mut self, key: PublicKey) {
        if self.waiting.contains_key(&key) {
            self.forget_waiting(&key);
        }
        if self.peers.get(&key).is_some_and(|entry| entry.ours) {
            self.ousted.insert(key);
        }
    }

    fn claim_of(&self, key: PublicKey, now: Instant) -> Claim {
        let (peer, waiting) = (self.entry(&key), self.waiting.get(&key));
        let first = peer.map(|entry| entry.first).into_iter().chain(waiting.map(|waiting| waiting.first)).min();
        let first = first.unwrap_or(now.into());
        let younger_than = |limit| move |since: Stamp| since.age(now) < limit;
        let proven = peer.and_then(|entry| entry.handshake).map(|handshake| handshake.quiet_since);
        let vouched = peer.and_then(|entry| entry.vouched).or_else(|| waiting?.vouched);
        let standing = if self.admission.trusts(&key)
            || proven.is_some_and(younger_than(self.policy.stale))
            || vouched.is_some_and(younger_than(self.policy.vouched()))
        {
            ClaimState::Established
        } else if younger_than(self.policy.grace)(first) {
            ClaimState::New
        } else {
            ClaimState::Expired
        };
        Claim { key, state: standing, first: first.into() }
    }

    /// What is known of the peer of `key`, also if it vanished.
    fn entry(&self, key: &PublicKey) -> Option<&Entry> {
        self.peers.get(key).or_else(|| self.vanished.get(key))
    }

    /// What is to be set: keys that wait, in full, as far as there is room, and what peers of ours lack. Keys that may
    /// not be set wait no longer.
    pub fn owed(&mut self, device: &Device, reserved: &Reserved) -> Vec<Step> {
        let mut steps = self.give_places(device.public_key, reserved);
        let again = self.waiting.keys().filter(|key| self.peers.contains_key(key));
        steps.extend(again.map(|key| Step::install(*key)));
        let stands = |key: &PublicKey| self.peers.get(key).is_some_and(|entry| entry.ours);
        let damaged = self.damaged(device).into_iter().filter(|(key, address)| {
            let is_reserved = || reserved.has_key(key) || reserved.has_address(address);
            let is_free = || !is_reserved() || (self.is_routers(key) && !reserved.lists(key));
            stands(key) && !self.waiting.contains_key(key) && is_free()
        });
        steps.extend(plan::repair(device, damaged));
        steps
    }

    /// Keys that wait without a peer, in order of arrival, as far as there is room: each keeps its place from now on. Those
    /// that may not be set wait no longer.
    pub fn give_places(&mut self, own: Option<PublicKey>, reserved: &Reserved) -> Vec<Step> {
        let mut room = self.room();
        let mut steps = Vec::new();
        for key in self.oldest_first() {
            if self.objection(&key, own, reserved, self.is_routers(&key)).is_some() {
                self.forget_waiting(&key);
            } else if self.lacks_place(&key) && room.take(self.has_own_place(&key)) {
                self.promise(&key);
                steps.push(Step::install(key));
            }
        }
        steps
    }

    /// Who has an address without a route or a flood entry, or a peer without one: few of them all, so they are found
    /// in one go through the tables, which have the same order.
    fn damaged(&self, device: &Device) -> BTreeMap<PublicKey, Ipv6Addr> {
        let (mut routes, mut fdb) = (plan::Among::new(&device.routes), plan::Among::new(&device.fdb));
        let owners = self.owners.iter().map(|(address, key)| (*key, Ipv6Addr::from(*address)));
        let lack = owners.filter(|(_, address)| !(routes.has(address) && fdb.has(address)));
        let bare = device.peers.iter().filter(|(_, peer)| peer.allowed_ips.is_empty());
        let bare = bare.map(|(key, _)| (*key, key.derived())).filter(|(key, at)| self.owners.get(at) == Some(key));
        lack.chain(bare.map(|(key, at)| (key, at.into()))).collect()
    }

    /// What is to be done with `keys`, which came in this order for the interface whose own key is `own`.
    ///
    /// What is known is set again whatever else comes. Others have room up to [`Policy::unproven`] and
    /// [`Policy::peers`]; beyond that they wait for the next read, which makes room among those that never shook hands.
    pub fn admit(
        &mut self,
        keys: impl IntoIterator<Item = PublicKey>,
        own: Option<PublicKey>,
        reserved: &Reserved,
        now: Instant,
    ) -> Admitted {
        let mut room = self.room();
        let mut admission = Admitted::default();
        for key in plan::merged(keys) {
            if let Some(reason) = self.objection(&key, own, reserved, self.is_routers(&key)) {
                admission.refused.push((key, reason));
            } else if !self.claim(key, now) {
                admission.refused.push((key, ADDRESS_TAKEN));
            } else if self.peers.contains_key(&key) {
                admission.known.push(key);
            } else if self.has_place(&key) || room.take(self.has_own_place(&key)) {
                admission.new.push(key);
            } else if self.unproven == 0 {
                self.owners.remove(&key.derived());
                admission.refused.push((key, FULL));
            } else {
                admission.deferred.push(key);
            }
        }
        // Of two that came at once the first was admitted before the second took its address.
        let (owners, refused) = (&self.owners, &mut admission.refused);
        for list in [&mut admission.known, &mut admission.new, &mut admission.deferred] {
            list.retain(|key| {
                let stays = owners.get(&key.derived()) == Some(key);
                if !stays {
                    refused.push((*key, ADDRESS_TAKEN));
                }
                stays
            });
        }
        admission
    }

    /// Why `key` may not be set, whoever has its address.
    fn objection(
        &self,
        key: &PublicKey,
        own: Option<PublicKey>,
        reserved: &Reserved,
        is_routers: bool,
    ) -> Option<&'static str> {
        let holder = self.foreign.get(&key.link_local());
        match key {
            key if Some(*key) == own => Some(OWN_KEY),
            key if reserved.lists(key) || (reserved.is_reserved(key) && !is_routers) => Some(RESERVED),
            key if holder.is_some_and(|holder| holder != key) => Some(ADDRESS_TAKEN),
            _ => None,
        }
    }

    fn room(&self) -> Room {
        let Policy { unproven, peers, .. } = self.policy;
        let (known, all) = (self.unproven + self.promised, self.peers.len() + self.promised);
        Room { unproven: unproven.saturating_sub(known), all: peers.saturating_sub(all) }
    }

    /// Keeps a place for the peer of `key`, which waits, until the next read.
    pub fn promise(&mut self, key: &PublicKey) {
        let is_new = !self.peers.contains_key(key);
        if let Some(waiting) = self.waiting.get_mut(key).filter(|waiting| is_new && !waiting.promised) {
            waiting.promised = true;
            self.promised += 1;
        }
    }

    /// What `key` waited for, if it does.
    fn stop_waiting(&mut self, key: &PublicKey) -> Option<Waiting> {
        let waiting = self.waiting.remove(key);
        self.promised -= usize::from(waiting.is_some_and(|waiting| waiting.promised));
        waiting
    }

    /// Whether there is a peer whose address another key has.
    #[must_use]
    pub fn ousts(&self) -> bool {
        !self.ousted.is_empty()
    }

    /// Peers of ours that are to go so that others have room: those that lost their address, and, where keys wait for
    /// room, of those that never shook hands the oldest, and more of them than that. Judged by the last read.
    #[must_use]
    pub fn surplus(&self) -> BTreeSet<PublicKey> {
        let mut surplus = self.ousted.clone();
        let mut room = self.room();
        let new = self.waiting.keys().filter(|key| self.lacks_place(key));
        let lacking = new.filter(|key| !room.take(self.has_own_place(key))).count();
        if lacking > 0 {
            let beyond = self.unproven.saturating_sub(self.policy.unproven);
            let portion = Some(self.unproven / PORTION).filter(|portion| *portion >= PORTION_MIN).unwrap_or_default();
            let number = beyond + portion + lacking.min(portion.max(AT_ONCE));
            let mut oldest: Vec<_> = self.may_go().collect();
            oldest.sort_unstable();
            surplus.extend(oldest.into_iter().take(number).map(|(_, key)| key));
        }
        surplus
    }

    /// Whether keys wait for which there is no room.
    #[must_use]
    pub fn lacks_room(&self) -> bool {
        self.waiting.keys().any(|key| self.lacks_place(key))
    }

    /// Whether the peer of `key`, which was among the [`surplus`](Self::surplus), is still to go.
    #[must_use]
    pub fn is_surplus(&self, key: &PublicKey) -> bool {
        let may_go = |entry: &Entry| entry.is_unproven() && !self.admission.trusts(key);
        self.ousted.contains(key) || self.peers.get(key).is_some_and(may_go)
    }

    /// Peers that may make room for others, and when each key came.
    fn may_go(&self) -> impl Iterator<Item = (Stamp, PublicKey)> {
        let may_go = |key, entry: &Entry| entry.is_unproven() && !self.admission.trusts(key);
        self.peers.iter().filter(move |(key, entry)| may_go(key, entry)).map(|(key, entry)| (entry.arrived, *key))
    }

    fn forget_waiting(&mut self, key: &PublicKey) {
        self.stop_waiting(key);
        self.vanished.remove(key);
        self.disown(key);
    }

    /// `key` is not what it was, and has no address any more unless it has a peer.
    fn disown(&mut self, key: &PublicKey) {
        self.changed.insert(*key);
        let address = key.derived();
        if !self.peers.contains_key(key) && self.owners.get(&address) == Some(key) {
            self.owners.remove(&address);
        }
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

    /// Which of the live `keys` have no peer here, do not wait for one, may be set, and would not be stale at once. They
    /// are owed from now on; those for which there is room are returned, the oldest first.
    pub fn learn(
        &mut self,
        keys: impl IntoIterator<Item = (PublicKey, Age)>,
        own: Option<PublicKey>,
        reserved: &Reserved,
        now: Instant,
    ) -> Learnt {
        let mut lacking = Vec::new();
        for (key, Age { age_secs: age, has_handshake: proven }) in keys {
            let age = Duration::from_secs(age);
            // What shakes hands is reported every so often; what never did has its grace alone.
            let lives = if proven { self.policy.vouched() } else { self.policy.grace };
            if age >= lives {
                continue;
            }
            let heard = now.checked_sub(age).unwrap_or(now);
            let waiting = Waiting { came: proven, ..Waiting::heard_of(heard.into(), proven) };
            if self.vouch(&key, waiting.vouched) {
                continue;
            }
            if self.objection(&key, own, reserved, proven).is_none() {
                self.waiting.insert(key, waiting);
                self.changed.insert(key);
                lacking.push((heard, key));
            }
        }
        lacking.retain(|(_, key)| self.outranks(*key, now) && self.claim(*key, now));
        lacking.retain(|(_, key)| self.waiting.contains_key(key));
        lacking.sort_unstable();
        let mut room = self.room();
        let (next, others): (Vec<_>, Vec<_>) =
            lacking.into_iter().partition(|(_, key)| room.take(self.has_own_place(key)));
        for (_, key) in &next {
            self.promise(key);
        }
        let number = next.len() + self.wait_for_room(others);
        if self.waiting.len() > self.policy.waiting {
            self.drop_oldest();
        }
        Learnt { number, next: next.into_iter().map(|(_, key)| key).collect() }
    }

    /// Lets those of `keys`, given with when they came, wait whom the next read makes room for, and says how many: none
    /// that never shook hands pushes out one that came after it. A flood's keys would do so to each other for ever.
    fn wait_for_room(&mut self, keys: Vec<(Instant, PublicKey)>) -> usize {
        if keys.is_empty() {
            return 0;
        }
        let may_always = |key: &PublicKey| self.has_own_place(key) || self.admission.trusts(key);
        let (always, mut others): (Vec<_>, Vec<_>) = keys.into_iter().partition(|(_, key)| may_always(key));
        others.reverse();
        let mut oldest: Vec<_> = self.may_go().map(|(arrived, _)| Instant::from(arrived)).collect();
        oldest.sort_unstable();
        let pairs = others.iter().zip(oldest.into_iter().skip(always.len()));
        // Ages are in whole seconds.
        let newer = pairs.take_while(|((heard, _), oldest)| *heard > *oldest + Duration::from_secs(1)).count();
        for (_, key) in &others[newer..] {
            self.forget_waiting(key);
        }
        always.len() + newer
    }

    /// Whether nobody has the address of `key`, which waits, with as good a claim. If somebody has, it waits no longer:
    /// how old a claim is nobody can say who was not there.
    fn outranks(&mut self, key: PublicKey, now: Instant) -> bool {
        let owner = self.owners.get(&key.derived()).copied().filter(|owner| *owner != key);
        let standing = |key| self.claim_of(key, now).state;
        let outranks = owner.is_none_or(|owner| standing(key) > standing(owner));
        if !outranks {
            self.forget_waiting(&key);
        }
        outranks
    }

    /// A broker says of a key, if it is known, when it shook hands elsewhere.
    fn vouch(&mut self, key: &PublicKey, shaken: Option<Stamp>) -> bool {
        let known = match self.peers.get_mut(key) {
            Some(entry) => Some((&mut entry.vouched, &mut entry.came)),
            None => self.waiting.get_mut(key).map(|waiting| (&mut waiting.vouched, &mut waiting.came)),
        };
        let Some((vouched, came)) = known else { return false };
        *vouched = (*vouched).max(shaken);
        *came |= shaken.is_some();
        true
    }

    /// Whether the key is one of a router that shook hands: then no word of another gateway makes it that one's.
    fn is_routers(&self, key: &PublicKey) -> bool {
        let waits = |key| self.waiting.get(key).is_some_and(|waiting| waiting.came && waiting.vouched.is_some());
        self.entry(key).is_some_and(Entry::is_routers) || waits(key)
    }

    fn has_place(&self, key: &PublicKey) -> bool {
        self.waiting.get(key).is_some_and(|waiting| waiting.promised)
    }

    /// `key` waits, and neither has a peer nor a place for one.
    fn lacks_place(&self, key: &PublicKey) -> bool {
        !self.has_place(key) && !self.peers.contains_key(key)
    }

    /// Whether `key`, which waits, takes no place of those that never shook hands.
    fn has_own_place(&self, key: &PublicKey) -> bool {
        self.waiting.get(key).is_some_and(|waiting| waiting.vouched.is_some())
            || self.vanished.get(key).is_some_and(|entry| !entry.is_unproven())
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
            let long_ago = |at: Stamp| at.age(now) >= policy.report;
            entry.ours && entry.reported.is_none_or(long_ago) && entry.state(&policy, now) == PeerState::Connected
        };
        let due = self.peers.iter_mut().filter(|(_, entry)| due(entry));
        due.map(|(key, entry)| {
            entry.reported = Some(now.into());
            *key
        })
        .collect()
    }

    /// What was reported may not have been heard.
    pub fn report_all(&mut self) {
        self.peers.values_mut().chain(self.vanished.values_mut()).for_each(|entry| entry.reported = None);
    }

    /// The keys that are not as they were when this was last called, and what to remember of each; none if it is gone.
    pub fn take_changed(&mut self) -> Vec<(PublicKey, Option<KeyRecord>)> {
        let changed = std::mem::take(&mut self.changed);
        changed.into_iter().map(|key| (key, self.kept(&key))).collect()
    }

    fn kept(&self, key: &PublicKey) -> Option<KeyRecord> {
        let standing = self.entry(key).filter(|entry| entry.ours);
        let waiting = self.waiting.get(key);
        let arrived = standing.map(|entry| entry.arrived).or_else(|| Some(waiting?.arrived))?;
        let proven = standing.is_some_and(|entry| entry.handshake.is_some() || entry.vouched.is_some())
            || waiting.is_some_and(|waiting| waiting.vouched.is_some());
        Some(KeyRecord { last: arrived.into(), proven })
    }

    /// At most so many of the peers of ours that are silent for longer than the kernel is to know of them.
    #[must_use]
    pub fn idle(&self, most: usize, now: Instant) -> Vec<PublicKey> {
        let Some(forget) = self.policy.forget else { return Vec::new() };
        let silent = |handshake: Handshake| handshake.quiet_since.age(now) >= forget;
        let idle = |entry: &Entry| entry.ours && !entry.renewed && entry.handshake.is_some_and(silent);
        self.peers.iter().filter(|(_, entry)| idle(entry)).map(|(key, _)| *key).take(most).collect()
    }

    /// The kernel does not know any more of the handshakes of `key`; here they count on.
    pub fn forgotten(&mut self, key: &PublicKey) {
        if let Some(entry) = self.peers.get_mut(key) {
            entry.renewed = true;
        }
    }

    /// The peers of ours that are stale, judged by the last read.
    #[must_use]
    pub fn stale(&self, now: Instant) -> BTreeSet<PublicKey> {
        let stale = |entry: &Entry| entry.ours && entry.state(&self.policy, now) == PeerState::Stale;
        let stale = self.peers.iter().filter(|(key, entry)| stale(entry) && !self.admission.trusts(key));
        stale.map(|(key, _)| *key).collect()
    }

    /// Forgets the keys of peers that vanished, were put back, vanished again, and are stale: a sweep never saw them.
    pub fn forget_stale(&mut self, now: Instant) {
        let stale = |entry: &Entry| entry.renewed && entry.state(&self.policy, now) == PeerState::Stale;
        let stale = self
            .vanished
            .iter()
            .filter(|(key, entry)| stale(entry) && !self.is_announced(key) && !self.admission.trusts(key));
        for key in stale.map(|(key, _)| *key).collect::<Vec<_>>() {
            self.forget_waiting(&key);
        }
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

    /// `key` came and stands whole in the kernel; it has its grace from `now`. Says whether it is new there.
    pub fn stands(&mut self, key: PublicKey, now: Instant) -> bool {
        let (entry, is_new) = self.seat(key, now);
        entry.arrived = now.into();
        is_new
    }

    /// Whether the peer of `key` vanished, which did not come since.
    #[must_use]
    pub fn has_vanished(&self, key: &PublicKey) -> bool {
        self.vanished.contains_key(key) && !self.is_announced(key)
    }

    /// The peer of `key`, which vanished, stands whole in the kernel again.
    pub fn put_back(&mut self, key: PublicKey, now: Instant) {
        self.seat(key, now);
    }

    fn seat(&mut self, key: PublicKey, now: Instant) -> (&mut Entry, bool) {
        let waited = self.stop_waiting(&key);
        let vanished = self.vanished.remove(&key).map(|entry| entry.made_anew(now));
        let known = self.peers.contains_key(&key);
        self.changed.insert(key);
        let entry = self.peers.entry(key).or_insert_with(|| {
            let new = Entry::new(&key, now, true);
            vanished.unwrap_or(Entry { first: waited.map_or(new.first, |waited| waited.first), ..new })
        });
        entry.vouched = entry.vouched.max(waited.and_then(|waited| waited.vouched));
        entry.came |= waited.is_none_or(|waited| waited.came);
        if !known && entry.is_unproven() {
            self.unproven += 1;
        }
        (entry, waited.is_some() || !known)
    }

    /// `key` came and does not stand whole: it is owed. Says how many older ones that made too many.
    pub fn wants(&mut self, key: PublicKey, now: Instant) -> usize {
        let before = self.waiting.get(&key);
        let (first, vouched, promised) =
            before.map_or((now.into(), None, false), |before| (before.first, before.vouched, before.promised));
        let arrived = now.into();
        self.waiting.insert(key, Waiting { arrived, first, tries: 0, announced: true, vouched, promised, came: true });
        self.changed.insert(key);
        if self.waiting.len() <= self.policy.waiting { 0 } else { self.drop_oldest() }
    }

    /// A sixteenth at once, so that a flood does not cost a search per key. Those that shook hands go last.
    fn drop_oldest(&mut self) -> usize {
        let surplus = self.waiting.len() - self.policy.waiting + self.policy.waiting / 16;
        let mut oldest = self.oldest_first();
        oldest.sort_by_key(|key| self.has_own_place(key));
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

    /// The peer of `key` could not be removed whole. If the next read does not show it, it is gone.
    pub fn unwanted(&mut self, key: &PublicKey) {
        if let Some(entry) = self.peers.get_mut(key) {
            entry.ours = false;
            self.changed.insert(*key);
        }
    }

    /// `key` was removed from the kernel.
    pub fn removed(&mut self, key: &PublicKey) {
        let unproven = self.peers.remove(key).is_some_and(|entry| entry.is_unproven());
        self.unproven = self.unproven.saturating_sub(usize::from(unproven));
        self.ousted.remove(key);
        self.disown(key);
    }
}

impl Entry {
    fn new(key: &PublicKey, arrived: Instant, ours: bool) -> Self {
        let (address, arrived, first) = (key.derived(), arrived.into(), arrived.into());
        let (handshake, vouched, reported) = (None, None, None);
        Self { address, arrived, first, handshake, vouched, reported, renewed: false, ours, came: false }
    }

    /// Its peer is another one than before. Once for each handshake it has its grace again for that: what is taken away
    /// again and again does not stay for ever.
    fn made_anew(mut self, now: Instant) -> Self {
        if !std::mem::replace(&mut self.renewed, true) {
            self.arrived = now.into();
        }
        self
    }

    /// It shook hands, and is no peer that somebody else made.
    fn is_routers(&self) -> bool {
        self.came && (self.handshake.is_some() || self.vouched.is_some())
    }

    /// Neither here nor elsewhere.
    fn is_unproven(&self) -> bool {
        self.ours && self.handshake.is_none() && self.vouched.is_none()
    }

    fn observe(&mut self, peer: &Peer, now: Clocks, since_last_read: Option<Duration>) {
        match (peer.last_handshake, self.handshake) {
            (Some(at), Some(known)) if nanoseconds(at) == known.at => {}
            (Some(at), _) => {
                self.handshake = Some(Handshake::first_seen(at, now, since_last_read));
                self.renewed = false;
            }
            (None, Some(_)) => *self = self.made_anew(now.monotonic),
            (None, None) => {}
        }
    }

    fn state(&self, policy: &Policy, now: Instant) -> PeerState {
        let idle = self.handshake.map(|handshake| handshake.quiet_since.age(now));
        match idle {
            Some(idle) if idle < policy.stale.min(policy.connected) => PeerState::Connected,
            Some(idle) if idle < policy.stale => PeerState::Idle,
            _ if self.arrived.age(now) < policy.grace => PeerState::Pending,
            _ => PeerState::Stale,
        }
    }
}

impl Handshake {
    /// A handshake that the last read did not show is no older than that read, whatever the wall clock says.
    fn first_seen(at: SystemTime, now: Clocks, since_last_read: Option<Duration>) -> Self {
        let by_wall = now.wall.duration_since(at).unwrap_or_default();
        let ago = since_last_read.map_or(by_wall, |longest| by_wall.min(longest));
        let quiet_since = now.monotonic.checked_sub(ago).unwrap_or(now.monotonic).into();
        Self { at: nanoseconds(at), quiet_since }
    }
}

/// A time of the kernel's, whose seconds are 64 bits and whose years before 1970 are none.
fn nanoseconds(at: SystemTime) -> u64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    since.as_secs().wrapping_mul(1_000_000_000).wrapping_add(since.subsec_nanos().into())
}

impl Waiting {
    /// For a peer that vanished.
    fn again(&Entry { arrived, first, vouched, came, .. }: &Entry) -> Self {
        Self { arrived, first, tries: 0, announced: false, vouched, promised: false, came }
    }

    /// Of a key that this program did not hear of itself.
    fn heard_of(arrived: Stamp, proven: bool) -> Self {
        let vouched = proven.then_some(arrived);
        Self { arrived, first: arrived, tries: 0, announced: false, vouched, promised: false, came: false }
    }
}

#[cfg(test)]
mod tests;
