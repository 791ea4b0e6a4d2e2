//! An instant in 8 bytes, since a gateway remembers some of each of its peers.

use std::num::NonZeroU64;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// Half of all stamps are before this instant, and half after it: 292 years each.
static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);
const MIDDLE: u64 = 1 << 63;

/// An [`Instant`] to the nanosecond. An `Option` of it is as small.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Stamp(NonZeroU64);

impl Stamp {
    /// How long ago it is; nothing if it is yet to come.
    pub(super) fn age(self, now: Instant) -> Duration {
        now.saturating_duration_since(self.into())
    }
}

impl From<Instant> for Stamp {
    fn from(instant: Instant) -> Self {
        let nanos = |distance: Duration| u64::try_from(distance.as_nanos()).unwrap_or(u64::MAX);
        let after = nanos(instant.saturating_duration_since(*EPOCH));
        let before = nanos(EPOCH.saturating_duration_since(instant));
        Self(NonZeroU64::new(MIDDLE.saturating_add(after).saturating_sub(before)).unwrap_or(NonZeroU64::MIN))
    }
}

impl From<Stamp> for Instant {
    fn from(Stamp(stamp): Stamp) -> Self {
        let stamp = stamp.get();
        let before = EPOCH.checked_sub(Duration::from_nanos(MIDDLE.saturating_sub(stamp))).unwrap_or(*EPOCH);
        before + Duration::from_nanos(stamp.saturating_sub(MIDDLE))
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
        let stamps = instants.map(Stamp::from);
        assert!(stamps.is_sorted());
        assert_eq!(stamps.map(Instant::from), instants);
        assert_eq!(Stamp::from(epoch).age(epoch + year), year);
        assert_eq!(Stamp::from(epoch).age(before(year)), Duration::ZERO);
        assert_eq!(size_of::<Option<Stamp>>(), 8);
    }
}
