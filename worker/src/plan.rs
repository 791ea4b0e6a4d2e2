//! The changes that lead from an interface's tables to the desired ones: no IO, no clock, no log.
//!
//! A [`Step`] sets or removes the objects of one key, and [`changes`] are its parts in the order in which the kernel
//! makes them. The steps are computed in [`repair`], for peers that are not complete, and in [`removal`]; [`Planned`]
//! has the changes of a step with their reason.
//!
//! No task, no state. Previous stop of a key: [`crate::peers`], which admits it; next stop: [`wgkex_kernel`], which makes
//! the changes.

mod planned;
mod removal;
mod repair;
mod sorted_cursor;
#[cfg(test)]
mod tests;

use wgkex_common::PublicKey;
use wgkex_kernel::{Change, KernelError, Outcomes};

pub use self::planned::{Planned, Reason};
pub use self::removal::{orphans, remove, remove_denied, remove_orphans};
pub use self::repair::repair;
pub use self::sorted_cursor::SortedCursor;
use crate::profiles::DesiredPeer;

/// A step for one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The desired peer of the key, or its former one.
    pub peer: DesiredPeer,
    /// The objects that are set or removed.
    pub action: Action,
}

/// Setting or removing some of a key's objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// They are set.
    Set(Objects),
    /// They are removed.
    Remove(Objects),
    /// The peer is set with its allowed-ips and no others.
    Replace,
    /// The peer is created again: without endpoint, handshake and counters.
    Renew,
}

/// Some of the kernel's objects for a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Objects {
    /// The peer with its allowed-ips.
    pub peer: bool,
    /// Its routes, if it has any.
    pub routes: bool,
    /// Its entry in the flood list, if it has one.
    pub flood: bool,
}

/// All changes of `steps`, in their order.
#[must_use]
pub fn changes(steps: &[Step]) -> Vec<Change> {
    let mut changes = Vec::with_capacity(3 * steps.len());
    for step in steps {
        step.add_changes(&mut changes);
    }
    changes
}

/// The outcome of each key of `steps`, given the results of their [`changes`]: success only if all changes succeeded,
/// else the first error.
#[must_use]
pub fn outcomes(steps: &[Step], applied: Outcomes) -> Vec<(PublicKey, Result<(), KernelError>)> {
    let mut applied = applied.into_iter();
    let outcome = |step: &Step| {
        let mut outcome = Ok(());
        for (_, result) in applied.by_ref().take(step.change_count()) {
            outcome = outcome.and(result);
        }
        (step.key(), outcome)
    };
    steps.iter().map(outcome).collect()
}

impl Step {
    /// Sets all objects of a peer, whatever exists already.
    #[must_use]
    pub fn install(peer: DesiredPeer) -> Self {
        Self { peer, action: Action::Set(Objects::ALL) }
    }

    /// Creates a peer again, so that its endpoint is forgotten.
    #[must_use]
    pub fn renew(peer: DesiredPeer) -> Self {
        Self { peer, action: Action::Renew }
    }

    /// Its key.
    #[must_use]
    pub fn key(&self) -> PublicKey {
        self.peer.key()
    }

    /// The peer is set first and removed last: after a crash an incomplete key still has its peer, by which it is found
    /// again.
    fn add_changes(&self, changes: &mut Vec<Change>) {
        let (key, networks) = (self.key(), self.peer.networks());
        let networks = |objects: Objects| networks.iter().copied().filter(move |_| self.peer.routes && objects.routes);
        let flood = |objects: Objects| self.peer.flood.filter(|_| objects.flood);
        match self.action {
            Action::Set(objects) => {
                changes.extend(objects.peer.then(|| Change::SetPeer(self.peer.peer.clone())));
                changes.extend(networks(objects).map(Change::SetRoute));
                changes.extend(flood(objects).map(Change::AddFdb));
            }
            Action::Remove(objects) => {
                changes.extend(networks(objects).map(Change::RemoveRoute));
                changes.extend(flood(objects).map(Change::RemoveFdb));
                changes.extend(objects.peer.then_some(Change::RemovePeer(key)));
            }
            Action::Replace => changes.push(Change::ReplacePeer(self.peer.peer.clone())),
            Action::Renew => changes.extend([Change::RemovePeer(key), Change::SetPeer(self.peer.peer.clone())]),
        }
    }

    fn change_count(&self) -> usize {
        match self.action {
            Action::Set(objects) | Action::Remove(objects) => {
                let routes = if self.peer.routes && objects.routes { self.peer.networks().len() } else { 0 };
                usize::from(objects.peer) + routes + usize::from(objects.flood && self.peer.flood.is_some())
            }
            Action::Replace => 1,
            Action::Renew => 2,
        }
    }
}

impl Objects {
    /// All of them.
    pub const ALL: Self = Self { peer: true, routes: true, flood: true };
    /// None of them.
    pub const NONE: Self = Self { peer: false, routes: false, flood: false };
}
