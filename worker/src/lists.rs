//! What changed access lists lead to: the reconciler takes over which keys are admitted, and removes those just denied.
//!
//! No task of its own: [`apply`] runs in the task of [`wgkex_common::access_lists::service`], which owns the lists. Next
//! stop: [`crate::reconciler`].

use prometheus::{Error, IntCounterVec, IntGauge, IntGaugeVec};
use wgkex_common::access_lists::service::ListUpdate;
use wgkex_common::access_lists::{List, Verdict, files};
use wgkex_common::runtime::metrics::{Registry, set};

use crate::reconciler::ReconcilerHandle;

/// Clones count into the same ones.
#[derive(Debug, Clone)]
pub struct Metrics {
    damaged: IntGaugeVec,
    keys: IntGaugeVec,
    kept: IntGauge,
    entries_refused: IntCounterVec,
}

/// Applies changed lists.
pub fn apply(reconciler: ReconcilerHandle, metrics: Metrics) -> impl FnMut(ListUpdate<'_>) {
    move |update| {
        metrics.set(&update);
        let is_denied = |key| update.admission.verdict("", key) == Verdict::Denied;
        let denied = update.records.iter().filter(|record| record.entry.list == List::Deny);
        let denied = denied.filter(|record| record.present && is_denied(&record.entry.key));
        reconciler.admit(update.admission.clone(), denied.map(|record| (record.entry.key, record.at)));
    }
}

impl Metrics {
    /// Registers them.
    pub fn register(registry: &Registry) -> Result<Self, Error> {
        Ok(Self {
            damaged: registry.gauges("wgkex_worker_lists_damaged", "1 while a list cannot be read.", &["list"])?,
            keys: registry.gauges("wgkex_worker_list_keys", "Keys on each list.", &["list"])?,
            kept: registry.gauge("wgkex_worker_lists_kept", "1 while entries made by admin calls are kept on disk.")?,
            entries_refused: registry.counters(
                "wgkex_worker_list_entries_refused_total",
                "List entries of brokers that were not taken in.",
                &["reason"],
            )?,
        })
    }

    /// Takes over the state of the lists.
    fn set(&self, update: &ListUpdate<'_>) {
        for list in files::SOURCES {
            self.damaged.with_label_values(&[list]).set(i64::from(update.damaged.contains(&list)));
        }
        for list in List::ALL {
            set(&self.keys.with_label_values(&[list.name()]), update.admission.len(list));
        }
        self.kept.set(i64::from(update.is_kept));
        for (reason, number) in update.refused.by_reason() {
            let refused = self.entries_refused.with_label_values(&[reason]);
            refused.inc_by(number.saturating_sub(refused.get()));
        }
    }
}
