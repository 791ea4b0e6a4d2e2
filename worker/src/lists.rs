//! The effect of changed access lists: the reconciler applies the new admission, and removes the keys just denied.
//!
//! No task: [`apply`] runs in the task of [`wgkex_common::access_lists::service`], which owns the lists. Next stop:
//! [`crate::reconciler`].

use prometheus::Error;
use wgkex_common::access_lists::metrics::ListMetrics;
use wgkex_common::access_lists::service::ListUpdate;
use wgkex_common::access_lists::{List, Verdict};
use wgkex_common::runtime::metrics::MetricsRegistry;

use crate::reconciler::ReconcilerHandle;

/// Applies changed lists.
pub fn apply(reconciler: ReconcilerHandle, metrics: ListMetrics) -> impl FnMut(ListUpdate<'_>) {
    move |update| {
        metrics.set(&update);
        let is_denied = |key| update.admission.verdict("", key) == Verdict::Denied;
        let denied = update.records.iter().filter(|record| record.entry.list == List::Deny);
        let denied = denied.filter(|record| record.present && is_denied(&record.entry.key));
        reconciler.set_admission(update.admission.clone(), denied.map(|record| (record.entry.key, record.at)));
    }
}

/// Registers the lists' metrics.
pub fn register(registry: &MetricsRegistry) -> Result<ListMetrics, Error> {
    Ok(ListMetrics {
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
