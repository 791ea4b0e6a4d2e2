//! The state of one domain: its interface and peers, and the next steps there. Pure: events are passed in with the
//! time, steps and counts are returned; no kernel, no log, no metrics.
//!
//! Arriving keys are handled in [`installs`], removals in [`removals`] and, past the deadline of a drain, in [`drain`];
//! this file handles reads of the tables and the backlog.
//!
//! Owner: the reconciler's task. Previous stop of a key: [`super::driver`], which executes the steps; next stops:
//! [`crate::peers`] and [`crate::plan`].

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

/// Steps of the backlog, or of a sweep, that are applied at once: new keys wait for no more than these.
const BACKLOG_SLICE: usize = 512;

/// The outcomes of keys in the kernel.
pub(super) type KeyOutcomes = Vec<(PublicKey, Result<(), KernelError>)>;

pub(super) struct DomainReconciler {
    name: Domain,
    interface: Interface,
    peers: KnownPeers,
    schedule: Schedule,
    /// The interface's own key, or why there are no usable tables.
    interface_key: Result<Option<PublicKey>, RejectReason>,
    /// Missing objects by the last read that are not set yet, and other waiting steps.
    backlog: VecDeque<Step>,
    evictions: Evictions,
    /// The removals of a drain past its deadline.
    drain: Removals,
    admission: Arc<Admission>,
    /// The last read failed for another reason than a missing interface, and that is logged.
    unreadable: bool,
}

/// The outcomes of keys, to be counted.
#[derive(Default)]
pub(super) struct Recorded {
    /// Keys that are newly in the kernel.
    pub installed: u64,
    /// Keys that arrived again.
    pub refreshed: u64,
    /// Keys whose lost objects were restored.
    pub restored: u64,
    /// The reasons of the failed ones.
    pub failed: Vec<RejectReason>,
    /// Pending keys that were dropped because there were too many.
    pub dropped: usize,
}

/// The changes that a read of the tables showed.
pub(super) struct ReadChange {
    /// How many peers of ours vanished from an interface that stayed.
    pub vanished: usize,
    /// The read before it failed.
    pub is_readable_again: bool,
}

/// The kind of a failure of the kernel.
pub(super) enum KernelFailure {
    /// The interface is not there or not usable.
    Lost(KernelError),
    /// Other changes failed.
    Changes {
        /// The first key with a failed change.
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

    /// The keys whose record has to be stored, each with that record; all keys if `all`.
    pub(super) fn take_changed(&mut self, all: bool) -> Vec<(PublicKey, Option<KeyRecord>)> {
        if all {
            self.peers.change_all();
        }
        self.peers.take_changed()
    }

    /// Applies a new admission; peers that are no longer admitted are removed at the next read.
    pub(super) fn apply_admission(&mut self, admission: Arc<Admission>) {
        self.backlog.retain(|step| !admission.must_remove(self.name.name(), &step.key()));
        self.peers.apply_admission(admission.clone());
        self.admission = admission;
    }

    /// Those of `keys` that have a peer here or are pending.
    pub(super) fn known_of(&self, keys: &BTreeSet<PublicKey>) -> Vec<PublicKey> {
        keys.iter().filter(|key| self.peers.contains(key)).copied().collect()
    }

    /// Earlier handshake reports may be lost: all are to be sent again.
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

    /// The number of keys that arrived and are not completely in the kernel, and the arrival of the oldest.
    pub(super) fn waiting(&self) -> (usize, Option<Instant>) {
        self.peers.waiting()
    }

    pub(super) fn has_backlog(&self) -> bool {
        !self.backlog.is_empty() || !self.evictions.steps.is_empty()
    }

    /// When the next read of the tables is due.
    pub(super) fn read_at(&self) -> Instant {
        self.schedule.read_at()
    }

    /// Schedules the next read as early as possible.
    pub(super) fn expedite(&mut self, now: Instant) {
        self.schedule.expedite(now);
    }

    /// A read has ended, with or without success, after this time.
    pub(super) fn on_read_ended(&mut self, now: Instant, took: Duration) {
        self.schedule.read(now, took);
    }

    /// Takes the next steps of the backlog.
    pub(super) fn take_backlog(&mut self) -> Vec<Step> {
        self.backlog.drain(..BACKLOG_SLICE.min(self.backlog.len())).collect()
    }

    /// Steps of the backlog were applied; returns also the outcomes to be published.
    pub(super) fn on_backlog(&mut self, outcomes: &KeyOutcomes, now: Instant) -> (Recorded, Report) {
        let (mut recorded, mut report) = (Recorded::default(), Report::new());
        for (key, outcome) in outcomes {
            match outcome {
                Ok(()) if self.peers.has_vanished(key) => {
                    self.peers.restore(*key, now);
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

    /// Whether there are usable tables.
    pub(super) fn has_tables(&self) -> bool {
        self.interface_key.is_ok()
    }

    /// Fills the backlog with the missing objects by the last read; returns how many peers are in which state.
    pub(super) fn plan_backlog(&mut self, device: &Device, reserved: &Reserved, now: Instant) -> PeerCounts {
        self.backlog = self.peers.pending_steps(device, reserved).into();
        self.make_more_room(now);
        if self.backlog.is_empty() {
            self.schedule.recovered();
        }
        self.schedule.on_success();
        self.peers.counts(now)
    }

    /// A read of the tables failed; returns whether that has to be logged.
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

    /// Changes were applied; returns the failure, if one failed.
    pub(super) fn on_applied(&mut self, outcomes: &KeyOutcomes, now: Instant) -> Option<KernelFailure> {
        let errors = || outcomes.iter().filter_map(|(key, outcome)| Some((key, outcome.as_ref().err()?)));
        let (key, first) = errors().next()?;
        self.schedule.on_failure(now);
        if let Some((_, error)) = errors().find(|(_, error)| matches!(error, KernelError::Interface { .. })) {
            self.mark_down(error);
            return Some(KernelFailure::Lost(error.clone()));
        }
        Some(KernelFailure::Changes { key: *key, error: first.clone(), failed: errors().count() })
    }

    fn mark_down(&mut self, error: &KernelError) {
        self.interface_key = Err(reject_reason(error));
        self.peers.lost();
        self.backlog.clear();
        self.evictions = Evictions::default();
    }
}

/// The outcomes to be published for these outcomes of the kernel.
pub(super) fn to_report(outcomes: KeyOutcomes) -> Report {
    outcomes.into_iter().map(|(key, outcome)| (key, outcome.map_err(|error| reject_reason(&error)))).collect()
}
