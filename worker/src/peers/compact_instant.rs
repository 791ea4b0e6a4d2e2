//! An instant in 8 bytes, since a gateway remembers some of each of its peers.

use std::num::NonZeroU64;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// Half of all values are before this instant, and half after it: 292 years each.
static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);
const MIDDLE: u64 = 1 << 63;

/// An [`Instant`] to the nanosecond. An `Option` of it is as small.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct CompactInstant(NonZeroU64);

impl CompactInstant {
    /// The time since then; zero if it is in the future.
    pub(super) fn age(self, now: Instant) -> Duration {
        now.saturating_duration_since(self.into())
    }
}

impl From<Instant> for CompactInstant {
    fn from(instant: Instant) -> Self {
        let nanos = |distance: Duration| u64::try_from(distance.as_nanos()).unwrap_or(u64::MAX);
        let after = nanos(instant.saturating_duration_since(*EPOCH));
        let before = nanos(EPOCH.saturating_duration_since(instant));
        Self(NonZeroU64::new(MIDDLE.saturating_add(after).saturating_sub(before)).unwrap_or(NonZeroU64::MIN))
    }
}

impl From<CompactInstant> for Instant {
    fn from(CompactInstant(nanos): CompactInstant) -> Self {
        let nanos = nanos.get();
        let before = EPOCH.checked_sub(Duration::from_nanos(MIDDLE.saturating_sub(nanos))).unwrap_or(*EPOCH);
        before + Duration::from_nanos(nanos.saturating_sub(MIDDLE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_is_the_instant_that_it_was_made_of_and_takes_eight_bytes() {
        let (epoch, year, little) = (*EPOCH, Duration::from_secs(31_536_000), Duration::from_nanos(1));
        let before = |time| epoch.checked_sub(time).unwrap();
        let instants = [before(year), before(little), epoch, epoch + little, epoch + year];
        let compact = instants.map(CompactInstant::from);
        assert!(compact.is_sorted());
        assert_eq!(compact.map(Instant::from), instants);
        assert_eq!(CompactInstant::from(epoch).age(epoch + year), year);
        assert_eq!(CompactInstant::from(epoch).age(before(year)), Duration::ZERO);
        assert_eq!(size_of::<Option<CompactInstant>>(), 8);
    }
}
