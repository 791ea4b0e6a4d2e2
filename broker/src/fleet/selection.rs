//! Which gateway the next router is given: of those that can serve it, the one furthest below its share of all peers
//! (contract section 6). No IO, no clock, no state.

use std::collections::BTreeMap;

use wgkex_common::WorkerName;
use wgkex_common::wire::message::WorkerData;

/// A gateway that can serve the router.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate<'a> {
    pub worker: &'a WorkerName,
    pub data: &'a WorkerData,
    pub confirms: bool,
    /// It did not confirm the last key in time.
    pub is_unresponsive: bool,
    /// Its connected peers.
    pub peers: u64,
}

/// The gateway that is selected for a router.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    /// The worker's name.
    pub worker: WorkerName,
    /// Whether it confirms each key, so that an answer may wait for that.
    pub confirms: bool,
    /// The answer to the router.
    pub data: WorkerData,
}

/// A gateway's place in the choice: the smaller one is better.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rank {
    /// It was unresponsive, or weighs nothing.
    pub is_last_resort: bool,
    /// Its peers beyond its target.
    pub excess: f64,
}

/// The gateways' weights, and the sums by which they become targets.
#[derive(Debug)]
pub(super) struct Shares<'a> {
    weights: &'a BTreeMap<WorkerName, f64>,
    total_weight: f64,
    total_peers: f64,
}

impl<'a> Shares<'a> {
    /// The shares by these `weights`, with the connected peers of each gateway that is online. Without weights all weigh the
    /// same.
    pub fn new(weights: &'a BTreeMap<WorkerName, f64>, online: impl Iterator<Item = u64>) -> Self {
        let (gateways, peers) = online.fold((0_u64, 0), |(gateways, sum), peers| (gateways + 1, sum + peers));
        let configured: f64 = weights.values().sum();
        #[expect(clippy::cast_precision_loss, reason = "counts of peers and gateways stay far below 2^52")]
        let (gateways, total_peers) = (gateways.max(1) as f64, peers as f64);
        Self { weights, total_weight: if configured > 0.0 { configured } else { gateways }, total_peers }
    }

    /// The weight of a gateway; 1 unless the config names it.
    pub fn weight(&self, worker: &WorkerName) -> f64 {
        self.weights.get(worker).copied().unwrap_or(1.0)
    }

    /// Its part of all weights.
    pub fn share(&self, worker: &WorkerName) -> f64 {
        self.weight(worker) / self.total_weight
    }

    /// The peers that a gateway should have by its weight.
    pub fn target(&self, worker: &WorkerName) -> f64 {
        self.share(worker) * self.total_peers
    }

    /// The candidate furthest below its target. One that was unresponsive, or that weighs nothing, is the last resort.
    pub fn select<'b>(&self, candidates: impl Iterator<Item = Candidate<'b>>) -> Option<Selection> {
        let ranked = candidates
            .map(|candidate| (self.rank(candidate.worker, candidate.peers, candidate.is_unresponsive), candidate));
        let best =
            ranked.min_by(|(a, _), (b, _)| a.is_last_resort.cmp(&b.is_last_resort).then(a.excess.total_cmp(&b.excess)));
        best.map(|(_, Candidate { worker, data, confirms, .. })| Selection {
            worker: worker.clone(),
            confirms,
            data: data.clone(),
        })
    }

    /// The place of a gateway with so many peers in the choice.
    pub fn rank(&self, worker: &WorkerName, peers: u64, is_unresponsive: bool) -> Rank {
        #[expect(clippy::cast_precision_loss, reason = "counts of peers stay far below 2^52")]
        let excess = peers as f64 - self.target(worker);
        Rank { is_last_resort: is_unresponsive || self.weight(worker) == 0.0, excess }
    }
}
