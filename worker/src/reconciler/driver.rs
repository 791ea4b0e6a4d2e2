//! One event at one domain: executes the decisions of the domain's state. It calls the kernel, and publishes, counts
//! and logs the outcomes.
//!
//! Previous stop of a key: [`super::task`]; next stops: [`super::domain`], the kernel, [`super::reports`].

use std::collections::BTreeSet;
use std::time::Instant;

use tokio::sync::watch;
use tokio::task::yield_now;
use tracing::{debug, info, warn};
use wgkex_common::runtime::heartbeat::Heartbeat;
use wgkex_common::{PublicKey, RejectReason, Reserved};
use wgkex_kernel::{Device, Kernel, KernelError};

use super::domain::{DomainReconciler, Evicted, KernelFailure, KeyOutcomes, ReadChange, Recorded, Renewed, to_report};
use super::reports::{Report, ReportSender, reject_reason};
use super::{Metrics, clock};
use crate::peers::Clocks;
use crate::plan::{self, Step};

/// A domain with everything that its work needs, at one time.
pub(super) struct Driver<'a, K> {
    pub kernel: &'a mut K,
    pub domain: &'a mut DomainReconciler,
    pub reports: &'a mut ReportSender,
    pub reserved: &'a watch::Receiver<Reserved>,
    /// Beats after each call of the kernel.
    pub heartbeat: &'a Heartbeat,
    pub metrics: &'a Metrics,
    pub now: Clocks,
}

impl<K: Kernel> Driver<'_, K> {
    /// Installs keys that arrived and publishes the outcome of each.
    pub(super) async fn install(&mut self, keys: Vec<PublicKey>) {
        let arrivals = self.domain.on_keys(keys, &self.reserved.borrow(), self.now());
        let mut rejected = self.reject(arrivals.rejected);
        if !arrivals.unavailable.is_empty() {
            self.record_outcomes(arrivals.unavailable, &mut rejected);
        }
        for steps in [arrivals.known, arrivals.new] {
            self.domain.supersede(&steps);
            let report = to_report(self.apply(&steps).await);
            if !report.is_empty() {
                self.record_outcomes(report, &mut rejected);
            }
        }
        self.reports.confirm(self.domain.name(), &rejected);
        let dropped = self.domain.on_delayed(arrivals.delayed, self.now());
        self.count_dropped(dropped);
    }

    /// Counts rejected keys. Reasons that a broker of ours would have refused are logged, once for a batch.
    fn reject(&self, rejected: Vec<(PublicKey, RejectReason)>) -> Report {
        let domain = self.domain.name();
        for wrong in [RejectReason::Reserved, RejectReason::AddressTaken] {
            let mut keys = rejected.iter().filter(|(_, reason)| *reason == wrong).map(|(key, _)| key);
            if let Some(key) = keys.next() {
                warn!(%domain, ?key, others = keys.count(), reason = %wrong, "key refused");
            }
        }
        let reject = |(key, reason): (PublicKey, RejectReason)| {
            debug!(%domain, ?key, %reason, "key refused");
            self.count_failed(&reason);
            (key, Err(reason))
        };
        rejected.into_iter().map(reject).collect()
    }

    /// Records the outcomes of keys that arrived, and publishes them in one message with those `rejected` before.
    fn record_outcomes(&mut self, mut report: Report, rejected: &mut Report) {
        let recorded = self.domain.on_installed(&report, self.now());
        self.count(&recorded);
        report.append(rejected);
        self.reports.confirm(self.domain.name(), &report);
    }

    /// Applies a part of the backlog; if it is empty, of the evictions.
    pub(super) async fn catch_up(&mut self) {
        let steps = self.domain.take_backlog();
        if steps.is_empty() {
            self.evict().await;
            self.domain.assign_slots(&self.reserved.borrow(), self.now());
            return;
        }
        let outcomes = self.apply(&steps).await;
        let (recorded, report) = self.domain.on_backlog(&outcomes, self.now());
        self.count(&recorded);
        self.reports.confirm(self.domain.name(), &report);
    }

    /// Removes the keys `denied` from the kernel, and returns the outcome of each.
    pub(super) async fn remove_denied(&mut self, denied: &BTreeSet<PublicKey>) -> Report {
        let known = self.domain.known_of(denied);
        match self.read(denied).await {
            Ok(report) => report,
            // If the tables cannot be read, all known keys fail for that reason; the next successful read removes them.
            Err(reason) => known.into_iter().map(|key| (key, Err(reason.clone()))).collect(),
        }
    }

    /// Reads the tables and does everything that follows from them; returns the outcomes of keys that are not admitted.
    /// Failed changes are tried again after the next read.
    pub(super) async fn read(&mut self, denied: &BTreeSet<PublicKey>) -> Result<Report, RejectReason> {
        let begun = tokio::time::Instant::now();
        let read = self.kernel.read(self.domain.interface()).await;
        self.heartbeat.beat();
        self.domain.on_read_ended(self.now(), begun.elapsed());
        match read {
            Ok(device) => Ok(self.apply_read(&device, denied).await),
            Err(error) => {
                let domain = self.domain.name().clone();
                self.metrics.read_failures.with_label_values(&[domain.name()]).inc();
                if self.domain.on_read_failure(&error, self.now()) {
                    warn!(%domain, %error, "tables cannot be read");
                }
                if let KernelError::Interface { .. } = &error {
                    self.reports.set_lost(&domain, &error);
                }
                Err(reject_reason(&error))
            }
        }
    }

    /// Each step takes long with many peers; it yields between them, so that MQTT and the shutdown can run.
    async fn apply_read(&mut self, device: &Device, denied: &BTreeSet<PublicKey>) -> Report {
        yield_now().await;
        let ReadChange { vanished, is_readable_again } = self.domain.on_read(device, &self.reserved.borrow(), self.now);
        let domain = self.domain.name();
        if is_readable_again {
            info!(%domain, "tables can be read again");
        }
        if vanished > 0 {
            warn!(%domain, peers = vanished, "peers vanished without a revocation; they are put back");
        }
        yield_now().await;
        let report = self.deny(device, denied).await;
        self.sweep(device).await;
        self.drain(device).await;
        self.domain.plan_evictions(device, clock());
        self.evict().await;
        self.renew(device).await;
        yield_now().await;
        if self.domain.has_tables() {
            self.restore(device).await;
        }
        yield_now().await;
        report
    }

    async fn deny(&mut self, device: &Device, denied: &BTreeSet<PublicKey>) -> Report {
        let denials = self.domain.plan_denials(device, denied, self.now());
        let outcomes = self.apply(&denials.steps).await;
        self.publish_gone(&outcomes, &RejectReason::Denied);
        let removed = self.domain.on_denials(&outcomes);
        if removed > 0 {
            let domain = self.domain.name();
            self.metrics.peers.denied.with_label_values(&[domain.name()]).inc_by(removed as u64);
            info!(%domain, removed, "peers of keys that may not be here are removed");
        }
        [denials.altered, to_report(outcomes)].concat()
    }

    async fn sweep(&mut self, device: &Device) {
        let Some(sweep) = self.domain.plan_sweep(device, self.now()) else { return };
        let outcomes = self.apply(&sweep.steps).await;
        self.publish_gone(&outcomes, &RejectReason::Removed);
        let removed = self.domain.on_swept(&sweep, &outcomes, self.now());
        let domain = self.domain.name();
        self.metrics.peers.sweeps.with_label_values(&[domain.name()]).inc();
        self.metrics.peers.stale.with_label_values(&[domain.name()]).inc_by(removed as u64);
        if removed > 0 {
            info!(%domain, removed, "stale peers are removed");
        }
    }

    /// Removes a portion of the peers, if the deadline of a drain is over.
    async fn drain(&mut self, device: &Device) {
        let portion = self.domain.plan_portion(device, clock());
        let outcomes = self.apply(&portion.steps).await;
        self.publish_gone(&outcomes, &RejectReason::Removed);
        let removed = self.domain.on_portion(&portion, &outcomes, clock());
        let domain = self.domain.name();
        self.metrics.peers.drained.with_label_values(&[domain.name()]).inc_by(removed as u64);
        if removed > 0 {
            info!(%domain, removed, left = portion.left(), "peers are removed by the drain");
        }
    }

    /// Evicts some peers: keys wait for their slots.
    async fn evict(&mut self) {
        if !self.domain.has_evictions() {
            return;
        }
        let steps = self.domain.take_evictions(clock());
        let outcomes = self.apply(&steps).await;
        self.publish_gone(&outcomes, &RejectReason::Removed);
        let Evicted { removed, removed_in_all } = self.domain.on_evicted(&outcomes);
        let domain = self.domain.name();
        self.metrics.peers.evicted.with_label_values(&[domain.name()]).inc_by(removed as u64);
        if let Some(removed) = removed_in_all {
            info!(%domain, removed, "peers without a handshake make room for others");
        }
    }

    async fn renew(&mut self, device: &Device) {
        let steps = self.domain.plan_renewals(device, self.now());
        let outcomes = self.apply(&steps).await;
        let Renewed { renewed, dropped } = self.domain.on_renewed(&outcomes, self.now());
        self.metrics.peers.renewed.with_label_values(&[self.domain.name().name()]).inc_by(renewed as u64);
        self.count_dropped(dropped);
    }

    /// Removes orphans, reports handshakes, and fills the backlog with missing objects.
    async fn restore(&mut self, device: &Device) {
        self.remove_orphans(device).await;
        let unreported = self.domain.unreported(self.now());
        if !self.reports.report(self.domain.name(), &unreported) {
            self.domain.report_all();
        }
        let counts = self.domain.plan_backlog(device, &self.reserved.borrow(), self.now());
        self.reports.set_tables(self.domain.name(), device, counts);
    }

    async fn remove_orphans(&mut self, device: &Device) {
        let orphaned = self.domain.plan_orphans(device, self.now());
        if orphaned.is_empty() {
            return;
        }
        let outcomes = self.kernel.apply(self.domain.interface(), orphaned).await;
        let domain = self.domain.name();
        let removed = outcomes.iter().filter(|(_, result)| result.is_ok()).count() as u64;
        self.metrics.peers.orphans.with_label_values(&[domain.name()]).inc_by(removed);
        match outcomes.into_iter().find_map(|(_, result)| result.err()) {
            None => info!(%domain, removed, "routes and flood entries without a peer are removed"),
            Some(error) => warn!(%domain, removed, %error, "routes or flood entries without a peer stay"),
        }
    }

    async fn apply(&mut self, steps: &[Step]) -> KeyOutcomes {
        if steps.is_empty() {
            return KeyOutcomes::new();
        }
        let begun = tokio::time::Instant::now();
        let applied = self.kernel.apply(self.domain.interface(), plan::changes(steps)).await;
        self.heartbeat.beat();
        #[expect(clippy::cast_precision_loss, reason = "a batch is small")]
        self.metrics.batch_keys.observe(steps.len() as f64);
        self.metrics.batch_duration.observe(begun.elapsed().as_secs_f64());
        let outcomes = plan::outcomes(steps, applied);
        let failure = self.domain.on_applied(&outcomes, self.now());
        let domain = self.domain.name();
        match failure {
            None => {}
            Some(KernelFailure::Lost(error)) => self.reports.set_lost(domain, &error),
            Some(KernelFailure::Changes { key, error, failed }) => {
                warn!(%domain, ?key, %error, failed, "changes failed");
            }
        }
        outcomes
    }

    /// Publishes that keys are no longer in the kernel, also those that could not be removed completely.
    fn publish_gone(&self, outcomes: &KeyOutcomes, reason: &RejectReason) {
        let gone: Report = outcomes.iter().map(|(key, _)| (*key, Err(reason.clone()))).collect();
        self.reports.confirm(self.domain.name(), &gone);
    }

    fn count(&self, recorded: &Recorded) {
        let labels = [self.domain.name().name()];
        self.metrics.keys_installed.with_label_values(&labels).inc_by(recorded.installed);
        self.metrics.peers.add_new(self.domain.name(), recorded.installed);
        self.metrics.keys_refreshed.with_label_values(&labels).inc_by(recorded.refreshed);
        self.metrics.keys_restored.with_label_values(&labels).inc_by(recorded.restored);
        for reason in &recorded.failed {
            self.count_failed(reason);
        }
        self.count_dropped(recorded.dropped);
    }

    fn count_failed(&self, reason: &RejectReason) {
        self.metrics.keys_failed.with_label_values(&[self.domain.name().name(), reason.as_ref()]).inc();
    }

    fn count_dropped(&self, dropped: usize) {
        self.metrics.keys_dropped.with_label_values(&["waiting"]).inc_by(dropped as u64);
    }

    fn now(&self) -> Instant {
        self.now.monotonic
    }
}
