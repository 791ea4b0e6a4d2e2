//! Which gateway the next router is given: of those that can serve it, the one furthest below its share of all peers
//! (contract section 6). A gateway that drains keeps its routers until its deadline, and gets no others; one that came back is
//! filled slowly.
//! No IO, no clock, no state.

use std::collections::BTreeMap;
use std::time::Duration;

use wgkex_common::WorkerName;
use wgkex_common::wire::message::WorkerData;

/// A gateway that came back is filled once it has this part of the peers that it should have.
const FILLED_FRACTION: f64 = 0.9;
/// A fleet whose first gateway came online so recently starts as a whole: none of them is filled slowly.
const FLEET_START: Duration = Duration::from_secs(60);

/// A gateway that is online, whether it can serve the router or not.
#[derive(Debug, Clone, Copy)]
pub(super) struct RankedLoad<'a> {
    pub worker: &'a WorkerName,
    /// Its connected peers.
    pub peers: u64,
    /// It did not confirm the last key in time.
    pub is_unresponsive: bool,
    /// The phase of its drain, if it drains.
    pub drain: Option<DrainPhase>,
    /// Since how long it is online and does not drain; none if that was so before this broker connected.
    pub age: Option<Duration>,
}

/// The phase of a drain, by its effect on the gateway's routers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DrainPhase {
    /// They stay.
    Keeps,
    /// It removes their peers: the deadline is over.
    Removes,
}

/// A gateway that can serve the router.
#[derive(Debug, Clone, Copy)]
pub(super) struct CandidateGateway<'a> {
    pub ranked_load: RankedLoad<'a>,
    pub data: &'a WorkerData,
    pub confirms: bool,
    /// The router is connected there.
    pub is_current: bool,
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

/// Why a gateway ranks before or after others, the best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Tier {
    /// It drains, and the router is connected there.
    Current,
    /// None of the other cases applies.
    Regular,
    /// It came back, and has the peers that it may have so far.
    Filling,
    /// It drains.
    Draining,
    /// It weighs nothing.
    Weightless,
    /// It did not confirm the last key in time.
    Unresponsive,
    /// It removes the peers of its routers.
    Removing,
}

impl Tier {
    /// Gateways of last resort are equal, apart from one that removes peers: its routers would return to it.
    fn place(self) -> Self {
        match self {
            Self::Draining | Self::Weightless | Self::Unresponsive => Self::Draining,
            Self::Current | Self::Regular | Self::Filling | Self::Removing => self,
        }
    }
}

/// A gateway's place in the choice.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rank {
    pub tier: Tier,
    /// Its peers beyond its target.
    pub excess: f64,
}

/// The gateways' weights, and the sums by which they become targets.
#[derive(Debug)]
pub(super) struct Shares<'a> {
    weights: &'a BTreeMap<WorkerName, f64>,
    total_weight: f64,
    total_peers: f64,
    /// The weights of those that are online and do not drain.
    online_weight: f64,
    /// The time in which a gateway that came back is filled: at most as long as the first of those that do not drain
    /// has been there.
    fill_time: Duration,
}

impl<'a> Shares<'a> {
    /// The shares by these `weights`, with each gateway that is online. Without weights all weigh the same. A gateway that
    /// came back is filled in `fill_time`.
    pub fn new<'b>(
        weights: &'a BTreeMap<WorkerName, f64>,
        fill_time: Duration,
        online: impl Iterator<Item = RankedLoad<'b>>,
    ) -> Self {
        let none = Self { weights, total_weight: 0.0, total_peers: 0.0, online_weight: 0.0, fill_time: Duration::ZERO };
        let (mut shares, mut number) = (none, 0.0_f64);
        for RankedLoad { worker, peers, drain, age, .. } in online {
            number += 1.0;
            shares.total_peers += real(peers);
            if drain.is_none() {
                shares.online_weight += shares.weight(worker);
                shares.fill_time = shares.fill_time.max(age.unwrap_or(fill_time).min(fill_time));
            }
        }
        if shares.fill_time < fill_time.min(FLEET_START) {
            shares.fill_time = Duration::ZERO;
        }
        let configured: f64 = weights.values().sum();
        shares.total_weight = if configured > 0.0 { configured } else { number.max(1.0) };
        shares
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

    /// The candidate furthest below its target. One that was unresponsive, drains, or weighs nothing, is the last resort, and
    /// one that removes peers only where there is none of these; but one that drains keeps the routers that are connected
    /// there, until it removes them.
    pub fn select<'b>(&self, candidates: impl Iterator<Item = CandidateGateway<'b>>) -> Option<Selection> {
        let ranked =
            candidates.map(|candidate| (self.rank_for_router(candidate.ranked_load, candidate.is_current), candidate));
        let best =
            ranked.min_by(|(a, _), (b, _)| a.tier.place().cmp(&b.tier.place()).then(a.excess.total_cmp(&b.excess)));
        best.map(|(_, CandidateGateway { ranked_load, data, confirms, .. })| Selection {
            worker: ranked_load.worker.clone(),
            confirms,
            data: data.clone(),
        })
    }

    /// The place of a gateway in the choice for a router that is connected there, or is not.
    pub fn rank_for_router(&self, ranked_load: RankedLoad<'_>, is_current: bool) -> Rank {
        let rank = self.rank(ranked_load);
        let stays = is_current && rank.tier == Tier::Draining;
        Rank { tier: if stays { Tier::Current } else { rank.tier }, ..rank }
    }

    /// The place of a gateway in the choice for a router that is new there.
    fn rank(&self, RankedLoad { worker, peers, is_unresponsive, drain, age }: RankedLoad<'_>) -> Rank {
        let tier = if drain == Some(DrainPhase::Removes) {
            Tier::Removing
        } else if is_unresponsive {
            Tier::Unresponsive
        } else if drain.is_some() {
            Tier::Draining
        } else if self.weight(worker) == 0.0 {
            Tier::Weightless
        } else if age.is_some_and(|age| self.is_filling(worker, real(peers), age)) {
            Tier::Filling
        } else {
            Tier::Regular
        };
        Rank { tier, excess: real(peers) - self.target(worker) }
    }

    /// Whether a gateway that is there for so long has as many peers as it may have by now: its part of all peers, among
    /// those that are online, grows from 0 in the time in which it is to be filled.
    fn is_filling(&self, worker: &WorkerName, peers: f64, age: Duration) -> bool {
        if age >= self.fill_time || self.online_weight <= 0.0 {
            return false;
        }
        let fair = self.total_peers * self.weight(worker) / self.online_weight;
        let grown = age.as_secs_f64() / self.fill_time.as_secs_f64();
        peers < FILLED_FRACTION * fair && peers >= grown * fair
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of peers stay far below 2^52")]
fn real(peers: u64) -> f64 {
    peers as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const OVER: Duration = Duration::from_secs(900);

    /// A gateway in a table: peers, seconds since it came back, whether it drains.
    #[derive(Debug, Clone, Copy)]
    struct GatewayRow {
        peers: u64,
        age: Option<u64>,
        drain: Option<DrainPhase>,
    }

    fn there(peers: u64) -> GatewayRow {
        GatewayRow { peers, age: None, drain: None }
    }

    fn back(peers: u64, age: u64) -> GatewayRow {
        GatewayRow { age: Some(age), ..there(peers) }
    }

    fn draining(peers: u64) -> GatewayRow {
        GatewayRow { drain: Some(DrainPhase::Keeps), ..there(peers) }
    }

    fn removing(peers: u64) -> GatewayRow {
        GatewayRow { drain: Some(DrainPhase::Removes), ..there(peers) }
    }

    /// The gateway, by its place in `rows`, that each of `routers` new ones is given, all at once.
    fn given(rows: &[GatewayRow], over: Duration, current_gateway: Option<usize>, routers: usize) -> Vec<usize> {
        let names: Vec<WorkerName> = (0..rows.len()).map(|n| format!("gw{n}").parse().unwrap()).collect();
        let data = WorkerData {
            external_address: "a".into(),
            port: 1,
            public_key: "TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=".parse().unwrap(),
            link_address: "b".into(),
        };
        let (weights, mut rows) = (BTreeMap::new(), rows.to_vec());
        let mut choose = || {
            let loads: Vec<_> = names
                .iter()
                .zip(&rows)
                .map(|(worker, row)| RankedLoad {
                    worker,
                    peers: row.peers,
                    is_unresponsive: false,
                    drain: row.drain,
                    age: row.age.map(Duration::from_secs),
                })
                .collect();
            let shares = Shares::new(&weights, over, loads.iter().copied());
            let candidates = loads.iter().enumerate().map(|(number, ranked_load)| CandidateGateway {
                ranked_load: *ranked_load,
                data: &data,
                confirms: true,
                is_current: current_gateway == Some(number),
            });
            let selection = shares.select(candidates).unwrap();
            let number = names.iter().position(|name| *name == selection.worker).unwrap();
            rows[number].peers += 1;
            number
        };
        (0..routers).map(|_| choose()).collect()
    }

    fn number(given: &[usize], gateway: usize) -> usize {
        given.iter().filter(|number| **number == gateway).count()
    }

    #[test]
    fn a_gateway_that_drains_gets_a_router_only_if_it_is_there_or_there_is_no_other() {
        for (rows, current_gateway, expected) in [
            (&[there(90), draining(5)][..], None, 0),
            (&[there(90), draining(5)], Some(1), 1),
            (&[there(90), draining(500)], Some(1), 1),
            (&[there(5), there(90)], Some(1), 0),
            (&[draining(9), draining(5)], None, 1),
            (&[draining(5)], None, 0),
            (&[back(0, 1), draining(90)], None, 0),
            (&[there(90), removing(5)], Some(1), 0),
            (&[draining(90), removing(5)], Some(1), 0),
            (&[removing(90), removing(5)], Some(0), 1),
            (&[removing(5)], Some(0), 0),
        ] {
            assert_eq!(given(rows, OVER, current_gateway, 1), [expected], "{rows:?} {current_gateway:?}");
        }
    }

    #[test]
    fn a_gateway_that_came_back_is_filled_in_the_time_for_that() {
        for (age, expected) in [(0, 0..=0), (90, 50..=80), (450, 300..=380), (899, 500..=500)] {
            let number = number(&given(&[there(1000), back(0, age)], OVER, None, 500), 1);
            assert!(expected.contains(&number), "{age}: {number}");
        }
        assert_eq!(number(&given(&[there(1000), back(0, 900)], OVER, None, 500), 1), 500, "it is over");
        assert_eq!(number(&given(&[there(1000), back(0, 0)], Duration::ZERO, None, 500), 1), 500, "it is off");
        assert_eq!(number(&given(&[there(1000), back(950, 1)], OVER, None, 50), 1), 50, "it has kept its peers");
    }

    /// Many routers that send requests in the time: the gateway has its share when it is over, and not before.
    #[test]
    fn the_rate_is_even() {
        let mut peers = [10_000, 0];
        for second in 0..=900 {
            let rows = [there(peers[0]), back(peers[1], second)];
            for gateway in given(&rows, OVER, None, 20) {
                peers[gateway] += 1;
            }
            let fair = u64::midpoint(peers[0], peers[1]);
            let most = fair * (second + 1) / 900 + 40;
            assert!(peers[1] <= most || peers[1] * 10 >= fair * 9, "{second}: {peers:?}");
        }
        assert!(peers[0].abs_diff(peers[1]) < 2_000, "{peers:?}");
    }

    #[test]
    fn a_fleet_that_starts_as_a_whole_and_a_lone_gateway_are_not_slowed() {
        for rows in [[back(0, 0), back(0, 0)], [back(0, 2), back(0, 2)], [there(0), there(0)]] {
            let first = given(&rows, OVER, None, 2);
            assert_eq!((number(&first, 0), number(&first, 1)), (1, 1), "{rows:?}");
        }
        let rows = [back(0, 20), back(0, 20), back(0, 20)];
        let many = given(&rows, OVER, None, 300);
        assert_eq!([0, 1, 2].map(|gateway| number(&many, gateway)), [100; 3]);
        assert_eq!(number(&given(&[back(300, 59), back(0, 1)], OVER, None, 300), 1), 300, "within a minute");
        let late = number(&given(&[back(300, 80), back(0, 60)], OVER, None, 300), 1);
        assert!(late >= 225, "one that was a little later: {late}");
        assert_eq!(given(&[back(0, 0)], OVER, None, 3), [0; 3]);
        assert_eq!(given(&[back(7, 1)], OVER, None, 1), [0]);
    }
}
