//! The metrics of the lists; each program has its own names for them.

use prometheus::{IntCounterVec, IntGauge, IntGaugeVec};

use crate::access_lists::service::ListUpdate;
use crate::access_lists::{List, files};
use crate::runtime::metrics::set;

/// Clones share the metrics.
#[derive(Debug, Clone)]
pub struct ListMetrics {
    /// Whether a list cannot be read, by list.
    pub damaged: IntGaugeVec,
    /// The keys on each list, by list.
    pub keys: IntGaugeVec,
    /// Whether entries made by admin calls are kept on disk.
    pub kept: IntGauge,
    /// Entries of other brokers that were rejected, by reason.
    pub entries_refused: IntCounterVec,
}

impl ListMetrics {
    /// The lists that cannot be read, by their keys in the config.
    #[must_use]
    pub fn damaged_lists(&self) -> Vec<&'static str> {
        files::SOURCES.into_iter().filter(|list| self.damaged.with_label_values(&[list]).get() == 1).collect()
    }

    /// Sets the metrics from the state of the lists.
    pub fn set(&self, update: &ListUpdate<'_>) {
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
