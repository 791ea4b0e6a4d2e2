//! The number of further peers that fit, and the number of peers to evict for others.

use super::pending::Pending;
use super::policy::Policy;
use super::table::PeerTable;

/// One in so many unestablished peers is evicted in addition, so that the next keys have room without a read for each.
const EVICTED_FRACTION: usize = 16;

/// Below this portion none is evicted in advance.
const EVICTED_MIN: usize = 4;

/// The most pending keys for which peers are evicted after one read, unless the portion is larger.
const EVICTED_AT_ONCE: usize = 64;

/// The number of further peers that fit.
#[derive(Debug, Clone, Copy)]
pub(super) struct PeerCapacity {
    /// For those that never had a handshake.
    unestablished: usize,
    /// For those of any kind.
    all: usize,
}

impl PeerCapacity {
    pub(super) fn of(policy: &Policy, table: &PeerTable, pending: &Pending) -> Self {
        let known = table.unestablished() + pending.slots();
        let all = table.len() + pending.slots();
        Self { unestablished: policy.unestablished.saturating_sub(known), all: policy.peers.saturating_sub(all) }
    }

    /// Takes the slot for a peer, if there is one; an `established` peer takes none of the slots for unestablished
    /// ones.
    pub(super) fn take(&mut self, established: bool) -> bool {
        let has_slot = self.all > 0 && (established || self.unestablished > 0);
        if has_slot {
            self.all -= 1;
            self.unestablished -= usize::from(!established);
        }
        has_slot
    }
}

/// How many of the `unestablished` peers have to be evicted for `lacking` keys without room; none if all have room.
pub(super) fn evictions(policy: &Policy, unestablished: usize, lacking: usize) -> usize {
    if lacking == 0 {
        return 0;
    }
    let beyond = unestablished.saturating_sub(policy.unestablished);
    let portion = Some(unestablished / EVICTED_FRACTION).filter(|portion| *portion >= EVICTED_MIN).unwrap_or_default();
    beyond + portion + lacking.min(portion.max(EVICTED_AT_ONCE))
}
