//! Changes with their reason, for a worker's operator.

use wgkex_kernel::Change;

use super::{Step, changes};

/// The reason of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// A list excludes the key.
    Denied,
    /// The peer is stale: it goes at the next sweep.
    Stale,
    /// The deadline of a drain is over: the peer is in the next portion.
    Drained,
    /// The peer is evicted for others, or its address is another key's.
    Evicted,
    /// The peer has been silent for so long that its endpoint is forgotten.
    Silent,
    /// The route or flood entry has no peer.
    Orphaned,
    /// The key has to be in the kernel, and is not, or not completely.
    Missing,
    /// The peer's lease is gone.
    Unleased,
}

/// Changes that belong together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// The reason.
    pub reason: Reason,
    /// The changes, in this order.
    pub changes: Vec<Change>,
}

impl Reason {
    /// The reason in a few words.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::Denied => "a list excludes the key",
            Self::Stale => "stale: removed by the next sweep, unless it shakes hands before",
            Self::Drained => "in the next portion of the drain, whose deadline is over",
            Self::Evicted => "makes room, or its address is another key's",
            Self::Silent => "forgets its endpoint (forget_idle_after)",
            Self::Orphaned => "has no peer: removed after 30 s",
            Self::Missing => "is missing",
            Self::Unleased => "has no lease any more",
        }
    }
}

impl Planned {
    /// Those of a step.
    #[must_use]
    pub fn of(reason: Reason, step: &Step) -> Self {
        Self { reason, changes: changes(std::slice::from_ref(step)) }
    }
}
