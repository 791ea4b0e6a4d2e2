//! The gateways that this broker's operator drains: part of [`Gateways`](super::gateways), which
//! [`drain_store`](super::drain_store) writes to the disk. No IO, no clock.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tracing::info;
use wgkex_common::WorkerName;
use wgkex_common::wire::drain::Drain;

/// The most drains: more than any fleet has gateways.
const DRAINS_MAX: usize = 4096;

/// The drains, by gateway.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drains {
    gateways: BTreeMap<WorkerName, Drain>,
}

/// The change of a gateway's drain when the file is read again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DrainChange<'a> {
    /// It drains, or in another way than before.
    Begun(&'a WorkerName, &'a Drain),
    /// It no longer drains.
    Ended(&'a WorkerName),
}

/// There are too many drains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{DRAINS_MAX} gateways drain already")]
pub struct TooManyDrains;

impl Drains {
    /// The gateways that drain.
    pub fn workers(&self) -> impl Iterator<Item = &WorkerName> {
        self.gateways.keys()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.gateways.is_empty()
    }

    /// The drain of a gateway.
    #[must_use]
    pub fn get(&self, worker: &WorkerName) -> Option<&Drain> {
        self.gateways.get(worker)
    }

    /// A drain of a gateway, in place of an earlier one.
    pub fn insert(&mut self, worker: WorkerName, drain: Drain) -> Result<(), TooManyDrains> {
        if self.gateways.len() >= DRAINS_MAX && !self.gateways.contains_key(&worker) {
            return Err(TooManyDrains);
        }
        self.gateways.insert(worker, drain);
        Ok(())
    }

    /// Ends the drain of a gateway; false if there is none.
    pub fn remove(&mut self, worker: &WorkerName) -> bool {
        self.gateways.remove(worker).is_some()
    }

    /// The drains that change or end when these are replaced by `next`.
    pub(super) fn changes<'a>(&'a self, next: &'a Self) -> impl Iterator<Item = DrainChange<'a>> {
        let begun = next.gateways.iter().filter(|(worker, drain)| self.get(worker) != Some(drain));
        let ended = self.workers().filter(|worker| next.get(worker).is_none());
        begun.map(|(worker, drain)| DrainChange::Begun(worker, drain)).chain(ended.map(DrainChange::Ended))
    }

    /// Ends the drains that are over, and returns their gateways.
    pub fn expire(&mut self, now: u64) -> Vec<WorkerName> {
        let over: Vec<_> =
            self.gateways.iter().filter(|(_, drain)| drain.is_over(now)).map(|(worker, _)| worker.clone()).collect();
        for worker in &over {
            self.gateways.remove(worker);
        }
        over
    }
}

impl DrainChange<'_> {
    pub fn log(self) {
        match self {
            Self::Begun(worker, drain) => {
                info!(worker = worker.as_str(), %drain, "draining, by the file: the gateway gets no new routers");
            }
            Self::Ended(worker) => {
                info!(worker = worker.as_str(), "no longer draining, by the file: the gateway gets new routers");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drains_are_bounded_and_end_at_their_time() {
        let drain = |until| Drain { since: 0, until, reason: None, deadline: None };
        let name = |number: usize| format!("gw{number}").parse::<WorkerName>().unwrap();
        let mut drains = Drains::default();
        for number in 0..DRAINS_MAX {
            drains.insert(name(number), drain((number < 2).then_some(10))).unwrap();
        }
        assert_eq!(drains.insert(name(DRAINS_MAX), drain(None)), Err(TooManyDrains));
        assert_eq!(drains.insert(name(1), drain(Some(20))), Ok(()), "in place of another");
        assert_eq!((drains.expire(9), drains.expire(10)), (Vec::new(), vec![name(0)]));
        assert!(drains.get(&name(1)).is_some() && drains.remove(&name(1)) && !drains.remove(&name(1)));
    }

    #[test]
    fn what_a_file_changes_is_known() {
        let drain = |reason: &str| Drain { since: 7, until: None, reason: Some(reason.into()), deadline: None };
        let drains = |all: &[(&str, &str)]| Drains {
            gateways: all.iter().map(|(worker, reason)| (worker.parse().unwrap(), drain(reason))).collect(),
        };
        let before = drains(&[("gone", "a"), ("other", "a"), ("same", "a")]);
        let after = drains(&[("new", "b"), ("other", "b"), ("same", "a")]);
        let name = |name: &str| name.parse::<WorkerName>().unwrap();
        let (gone, new, other, drain) = (name("gone"), name("new"), name("other"), drain("b"));
        assert_eq!(
            before.changes(&after).collect::<Vec<_>>(),
            [DrainChange::Begun(&new, &drain), DrainChange::Begun(&other, &drain), DrainChange::Ended(&gone)]
        );
    }
}
