//! Which of several keys that derive the same address has it: an address contains only 40 bits of a hash (contract
//! section 3), so a key for a given address is found by search in a minute. No IO, no clock.

use std::cmp::Ordering;
use std::time::{Duration, Instant};

use crate::PublicKey;

/// Two brokers that each admit a key at the same time must lead to the same result at every gateway, in whatever order
/// the gateways receive the keys. Keys that first arrived within this time of one another count as simultaneous.
const TIE_WINDOW: Duration = Duration::from_secs(5);

/// How often a gateway reports the handshakes of a peer, so that a router that is connected all the time stays among the
/// live keys, and keeps its address at gateways that it is not connected to.
#[must_use]
pub fn handshake_report_interval(ttl: Duration, stale: Duration) -> Duration {
    (ttl / 4).min(stale)
}

/// The strength of a key's claim to its address; the greater one wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ClaimState {
    /// It never had a handshake and its grace is over, or its last handshake is too long ago.
    Expired,
    /// It never had a handshake, and first arrived less than its grace ago.
    New,
    /// Its last handshake is too long ago, and it arrived again less than its grace ago. Used by brokers only.
    Returned,
    /// Its last handshake is no longer ago than a peer may be silent.
    Established,
}

/// A key's claim to the address it derives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// The key.
    pub key: PublicKey,
    /// The strength of the claim.
    pub state: ClaimState,
    /// When the key first arrived. Repeated requests do not change it.
    pub first: Instant,
}

impl Claim {
    /// Whether this key takes the address from `owner`: the stronger claim wins; of equal ones the older; of
    /// simultaneous ones the smaller key.
    #[must_use]
    pub fn precedes(&self, owner: &Self) -> bool {
        let apart =
            self.first.saturating_duration_since(owner.first) + owner.first.saturating_duration_since(self.first);
        match self.state.cmp(&owner.state) {
            Ordering::Equal if apart <= TIE_WINDOW => self.key < owner.key,
            Ordering::Equal => self.first < owner.first,
            Ordering::Greater => true,
            Ordering::Less => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(key: u8, state: ClaimState, first: Instant) -> Claim {
        Claim { key: PublicKey::from_bytes([key; 32]).unwrap(), state, first }
    }

    #[test]
    fn the_better_founded_claim_has_the_address_then_the_older_one_then_the_smaller_key() {
        use ClaimState::{Established, Expired, New, Returned};
        let early = Instant::now();
        let (soon, late) = (early + TIE_WINDOW, early + TIE_WINDOW + Duration::from_millis(1));
        for (challenger, owner, precedes) in [
            (claim(1, New, early), claim(2, Established, late), false),
            (claim(1, Expired, early), claim(2, New, late), false),
            (claim(2, Established, late), claim(1, New, early), true),
            (claim(2, New, late), claim(1, Expired, early), true),
            (claim(1, New, late), claim(2, New, early), false),
            (claim(2, New, early), claim(1, New, late), true),
            (claim(1, New, soon), claim(2, New, early), true),
            (claim(2, New, early), claim(1, New, soon), false),
            (claim(1, Established, late), claim(2, Established, early), false),
            (claim(2, Returned, late), claim(1, New, early), true),
            (claim(1, Returned, early), claim(2, Established, late), false),
        ] {
            assert_eq!(challenger.precedes(&owner), precedes, "{challenger:?} against {owner:?}");
        }
    }

    #[test]
    fn of_two_simultaneous_claims_the_same_one_wins_in_any_order() {
        let start = Instant::now();
        for (first, second) in [(1, 2), (2, 1)] {
            let (owner, challenger) =
                (claim(first, ClaimState::New, start), claim(second, ClaimState::New, start + TIE_WINDOW));
            let winner = if challenger.precedes(&owner) { challenger } else { owner };
            assert_eq!(winner.key, PublicKey::from_bytes([1; 32]).unwrap());
        }
    }
}
