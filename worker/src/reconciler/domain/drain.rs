//! A drain past its deadline: which peers are removed, and when. Peers of connected routers are removed in portions of
//! so many percent a minute, and so are the other ones, in separate portions: else a gateway that has the keys of the
//! whole fleet would lose all of its few connected routers in a minute.
//!
//! A key that a router sends is installed as before: brokers without another gateway, and originals, which do not know
//! drains, select this one. If the router does not connect here within the grace, its peer is removed again. Past the
//! deadline no peer is made for any other reason, such as a snapshot or the state file.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use wgkex_common::PublicKey;
use wgkex_common::wire::drain::Deadline;
use wgkex_kernel::Device;

use super::{BACKLOG_SLICE, DomainReconciler, KeyOutcomes};
use crate::peers::Drainable;
use crate::plan::{self, Step};
use crate::reconciler::portions::Portions;

/// The removals of a drain past its deadline.
#[derive(Debug, Default)]
pub(super) struct Removals {
    /// The deadline that is over; none without such a drain.
    deadline: Option<Deadline>,
    /// The sizes of the portions are computed, from the peers at the deadline.
    is_begun: bool,
    connected: Portions,
    silent: Portions,
    /// When routers sent their keys past the deadline.
    requested: BTreeMap<PublicKey, Instant>,
}

/// Peers to be removed now.
#[derive(Default)]
pub struct Portion {
    pub steps: Vec<Step>,
    /// Those whose routers are connected.
    connected: BTreeSet<PublicKey>,
    /// How many are left for later portions: with connected routers, and others.
    left: [usize; 2],
}

impl Portion {
    /// How many are left for later portions.
    pub fn left(&self) -> usize {
        self.left.iter().sum()
    }
}

impl Removals {
    /// Whether the deadline of a drain is over.
    pub(super) fn is_on(&self) -> bool {
        self.deadline.is_some()
    }

    /// A router sent `key`, which is now in the kernel.
    pub(super) fn on_request(&mut self, key: PublicKey, now: Instant) {
        if self.is_on() {
            self.requested.insert(key, now);
        }
    }

    fn set(&mut self, deadline: Option<Deadline>) -> bool {
        let is_news = self.deadline != deadline;
        if is_news {
            (self.deadline, self.is_begun) = (deadline, false);
            self.requested.clear();
        }
        is_news
    }

    /// Computes the sizes of the portions, at the first read past the deadline.
    fn begin(&mut self, deadline: Deadline, drainable: &Drainable) {
        self.connected.restart(deadline.percent, drainable.connected().len());
        self.silent.restart(deadline.percent, drainable.silent().len());
        self.is_begun = true;
    }
}

impl DomainReconciler {
    /// Resumes the removals of an earlier run of the program: the deadline of a drain was over when this one started.
    pub fn resume_removals(&mut self, deadline: Deadline, now: Instant) {
        self.drain.set(Some(deadline));
        self.drain.connected.assume_removed(now);
        self.drain.silent.assume_removed(now);
    }

    /// The deadline of a drain is over, or there is no such drain any more.
    pub fn set_deadline(&mut self, deadline: Option<Deadline>, now: Instant) {
        if self.drain.set(deadline) && deadline.is_some() {
            self.schedule.expedite(now);
        }
    }

    /// The peers to be removed now, if the deadline of a drain is over.
    pub fn plan_portion(&mut self, device: &Device, now: Instant) -> Portion {
        let Some(deadline) = self.drain.deadline else { return Portion::default() };
        self.peers.forget_unrequested();
        let (drain, peers) = (&mut self.drain, &self.peers);
        drain.requested.retain(|key, _| peers.contains(key));
        let drainable = peers.drainable(&drain.requested, now);
        if !drain.is_begun {
            drain.begin(deadline, &drainable);
        }
        let connected: BTreeSet<_> =
            drainable.connected().take(drain.connected.allowed(now).min(BACKLOG_SLICE)).collect();
        let silent = drainable.silent().take(drain.silent.allowed(now).min(BACKLOG_SLICE - connected.len()));
        let removed = connected.iter().copied().chain(silent).collect::<BTreeSet<_>>();
        let silent = removed.len() - connected.len();
        let left = [drainable.connected().len() - connected.len(), drainable.silent().len() - silent];
        Portion { steps: plan::remove(peers.profile(), device, &removed), connected, left }
    }

    /// Peers of a portion were removed, or could not be; returns how many were.
    pub fn on_portion(&mut self, portion: &Portion, outcomes: &KeyOutcomes, now: Instant) -> usize {
        let removed = self.on_removed(outcomes);
        let drain = &mut self.drain;
        let connected = outcomes.iter().filter(|(key, _)| portion.connected.contains(key)).count();
        drain.connected.on_removed(connected, now);
        drain.silent.on_removed(outcomes.len() - connected, now);
        for (portions, left) in [&mut drain.connected, &mut drain.silent].into_iter().zip(portion.left) {
            if left > 0 {
                self.schedule.expedite(portions.due(now));
            }
        }
        removed
    }
}
