//! The state of one domain: what is known of its interface, and what is to be done there next. Pure: what happened comes
//! in with the time, what is to be applied and counted goes out; no kernel, no log, no metrics.
//!
//! Keys that come are in [`installs`], peers that go in [`removals`], and in [`drain`] past its deadline; here is what a read of the tables and the backlog lead
//! to.
//!
//! Owner: the reconciler's task. Previous stop of a key: [`super::driver`], which carries out what this decides; next
//! stops: [`crate::peers`] and [`crate::plan`].

mod drain;
mod installs;
pub mod preview;
mod removals;

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use wgkex_common::access_lists::Admission;
use wgkex_common::storage::key_store::KeyRecord;
use wgkex_common::{Domain, PublicKey, RejectReason, Reserved};
use wgkex_kernel::{Device, Interface, KernelError};

use self::drain::Removals;
use self::removals::Evictions;
pub(super) use self::removals::{Evicted, Renewed};
use super::reports::{Report, reject_reason};
use super::schedule::Schedule;
use crate::peers::{Clocks, KnownPeers, PeerCounts, Policy};
use crate::plan::Step;
use crate::profiles::Profile;

/// Steps of the backlog, or of a sweep, at once: new keys wait no longer than for these.
const SLICE: usize = 512;

/// What became of keys in the kernel.
pub(super) type KeyOutcomes = Vec<(PublicKey, Result<(), KernelError>)>;

pub(super) struct DomainReconciler {
    name: Domain,
    interface: Interface,
    peers: KnownPeers,
    schedule: Schedule,
    /// The interface's own key, or why there are no tables to apply anything to.
    interface_key: Result<Option<PublicKey>, RejectReason>,
    /// What the last read showed to be missing, as far as it is not done.
    backlog: VecDeque<Step>,
    evictions: Evictions,
    /// What a drain past its deadline removes.
    drain: Removals,
    admission: Arc<Admission>,
    /// Reads fail for another reason than a missing interface, and that is known.
    unreadable: bool,
}

/// What became of keys, to be counted.
#[derive(Default)]
pub(super) struct Recorded {
    /// Keys that are newly in the kernel.
    pub installed: u64,
    /// Keys that came again.
    pub refreshed: u64,
    /// Keys of which something lost was restored.
    pub restored: u64,
    /// Why others failed.
    pub failed: Vec<RejectReason>,
    /// Pending keys that were too many.
    pub dropped: usize,
}

/// What a read of the tables changed.
pub(super) struct ReadChange {
    /// How many peers of ours vanished from an interface that stayed.
    pub vanished: usize,
    /// The read before it failed.
    pub is_readable_again: bool,
}

/// What a failure of the kernel means.
pub(super) enum Failure {
    /// The interface is not there or not usable.
    Lost(KernelError),
    /// Other changes failed.
    Changes {
        /// The first key of which one failed.
        key: PublicKey,
        /// Its error.
        error: KernelError,
        /// How many keys failed.
        failed: usize,
    },
}

impl DomainReconciler {
    pub(super) fn new(name: Domain, profile: Arc<dyn Profile>, policy: Policy, now: Instant) -> Self {
        Self {
            interface: profile.interface(&name),
            name,
            peers: KnownPeers::new(profile, policy),
            schedule: Schedule::new(&policy, now),
            interface_key: Err(RejectReason::Interface),
            backlog: VecDeque::new(),
            evictions: Evictions::default(),
            drain: Removals::default(),
            admission: Arc::default(),
            unreadable: false,
        }
    }

    pub(super) fn name(&self) -> &Domain {
        &self.name
    }

    pub(super) fn interface(&self) -> &Interface {
        &self.interface
    }

    /// Remembers, before the first read, a key that was in the kernel when the last worker ended.
    pub(super) fn remember(&mut self, key: PublicKey, record: KeyRecord) {
        self.peers.remember(key, record);
    }

    /// The keys to be written down, and what of each, or all of them.
    pub(super) fn take_changed(&mut self, all: bool) -> Vec<(PublicKey, Option<KeyRecord>)> {
        if all {
            self.peers.change_all();
        }
        self.peers.take_changed()
    }

    /// Takes over which keys are admitted; those that no longer are go at the next read.
    pub(super) fn apply_admission(&mut self, admission: Arc<Admission>) {
        self.backlog.retain(|step| !admission.must_remove(self.name.name(), &step.key()));
        self.peers.apply_admission(admission.clone());
        self.admission = admission;
    }

    /// Those of `keys` that have a peer here or are pending.
    pub(super) fn known_of(&self, keys: &BTreeSet<PublicKey>) -> Vec<PublicKey> {
        keys.iter().filter(|key| self.peers.contains(key)).copied().collect()
    }

    /// What was reported of handshakes may not have arrived.
    pub(super) fn report_all(&mut self) {
        self.peers.report_all();
    }

    /// The keys whose handshakes are to be reported.
    pub(super) fn unreported(&mut self, now: Instant) -> Vec<PublicKey> {
        self.peers.unreported(now)
    }

    pub(super) fn backlog_len(&self) -> usize {
        self.backlog.len()
    }

    /// How many keys came that are not whole in the kernel, and when the oldest of them did.
    pub(super) fn waiting(&self) -> (usize, Option<Instant>) {
        self.peers.waiting()
    }

    pub(super) fn has_backlog(&self) -> bool {
        !self.backlog.is_empty() || !self.evictions.steps.is_empty()
    }

    /// When the tables are to be read.
    pub(super) fn read_at(&self) -> Instant {
        self.schedule.read_at()
    }

    /// The tables are read as soon as that may be.
    pub(super) fn expedite(&mut self, now: Instant) {
        self.schedule.expedite(now);
    }

    /// A read took so long, well or not.
    pub(super) fn on_read_ended(&mut self, now: Instant, took: Duration) {
        self.schedule.read(now, took);
    }

    /// A part of the backlog.
    pub(super) fn take_backlog(&mut self) -> Vec<Step> {
        self.backlog.drain(..SLICE.min(self.backlog.len())).collect()
    }

    /// A part of the backlog was applied; returns also what is to be published of it.
    pub(super) fn on_backlog(&mut self, outcomes: &KeyOutcomes, now: Instant) -> (Recorded, Report) {
        let (mut recorded, mut report) = (Recorded::default(), Report::new());
        for (key, outcome) in outcomes {
            match outcome {
                Ok(()) if self.peers.has_vanished(key) => {
                    self.peers.put_back(*key, now);
                    recorded.restored += 1;
                }
                Ok(()) if self.peers.is_pending(key) => {
                    if self.peers.is_announced(key) {
                        report.push((*key, Ok(())));
                    }
                    self.record(&mut recorded, *key, &Ok(()), now);
                }
                Ok(()) => recorded.restored += 1,
                Err(KernelError::Interface { .. }) => {}
                Err(KernelError::Interrupted { .. } | KernelError::Refused { .. }) => self.peers.refused(key),
            }
        }
        (recorded, report)
    }

    /// The tables were read.
    pub(super) fn on_read(&mut self, device: &Device, reserved: &Reserved, now: Clocks) -> ReadChange {
        self.interface_key = Ok(device.public_key);
        let vanished = self.peers.observe(device, reserved, now);
        ReadChange { vanished, is_readable_again: std::mem::take(&mut self.unreadable) }
    }

    /// Whether there are tables to apply anything to.
    pub(super) fn has_tables(&self) -> bool {
        self.interface_key.is_ok()
    }

    /// What the read showed to be missing is the backlog; returns how many peers are in which state.
    pub(super) fn plan_backlog(&mut self, device: &Device, reserved: &Reserved, now: Instant) -> PeerCounts {
        self.backlog = self.peers.pending_steps(device, reserved).into();
        self.make_more_room(now);
        if self.backlog.is_empty() {
            self.schedule.recovered();
        }
        self.schedule.on_success();
        self.peers.counts(now)
    }

    /// The tables could not be read; returns whether that is news.
    pub(super) fn on_read_failure(&mut self, error: &KernelError, now: Instant) -> bool {
        if let KernelError::Interface { .. } = error {
            self.mark_down(error);
            return false;
        }
        if self.interface_key.is_err() {
            self.interface_key = Err(reject_reason(error));
        }
        self.schedule.on_failure(now);
        !std::mem::replace(&mut self.unreadable, true)
    }

    /// Changes were applied; returns what failed, if anything did.
    pub(super) fn on_applied(&mut self, outcomes: &KeyOutcomes, now: Instant) -> Option<Failure> {
        let errors = || outcomes.iter().filter_map(|(key, outcome)| Some((key, outcome.as_ref().err()?)));
        let (key, first) = errors().next()?;
        self.schedule.on_failure(now);
        if let Some((_, error)) = errors().find(|(_, error)| matches!(error, KernelError::Interface { .. })) {
            self.mark_down(error);
            return Some(Failure::Lost(error.clone()));
        }
        Some(Failure::Changes { key: *key, error: first.clone(), failed: errors().count() })
    }

    fn mark_down(&mut self, error: &KernelError) {
        self.interface_key = Err(reject_reason(error));
        self.peers.lost();
        self.backlog.clear();
        self.evictions = Evictions::default();
    }
}

/// What is published of keys that the kernel was asked for.
pub(super) fn to_report(outcomes: KeyOutcomes) -> Report {
    outcomes.into_iter().map(|(key, outcome)| (key, outcome.map_err(|error| reject_reason(&error)))).collect()
}
