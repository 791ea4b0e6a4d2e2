//! The public status of the broker, without keys: one value for the page, for `/status.json`, and for the commands that
//! read that.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use prometheus::Histogram;
use prometheus::core::Metric as _;
use serde::{Deserialize, Serialize};
use strum::VariantNames as _;
use wgkex_common::WorkerName;
use wgkex_common::access_lists::service::ListSnapshot;

use crate::exchange::Rejection;
use crate::exchange::in_flight::InFlightLoad;
use crate::fleet::live_keys::LiveKeyCounts;
use crate::fleet::status::{DomainGateways, GatewayStatus, Problem, ProblemKind};
use crate::http::App;
use crate::http::metrics::APIS;
use crate::mqtt_server::RefusedClient;
use crate::registry::{Registry, RegistryStatus};
use crate::tenants::{HubProblem, TenantProblems, TenantStatus, TenantsHttpState};

/// The path of the status as JSON.
pub const STATUS_PATH: &str = "/status.json";

/// The broker and its fleet at one time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The broker's version.
    pub version: String,
    /// Its process id; 0 if it is not known.
    #[serde(default)]
    pub pid: u32,
    /// For how long it has run.
    pub uptime_secs: u64,
    /// Whether it can serve routers.
    pub ready: bool,
    /// The problems that an operator should check, the worst first.
    pub problems: Vec<Problem>,
    /// The domains that are served.
    pub domains: Vec<DomainGateways>,
    /// The gateways on the bus.
    pub gateways: Vec<GatewayStatus>,
    /// The clients that this broker's MQTT server refused last, the newest first.
    #[serde(default)]
    pub refused_clients: Vec<RefusedClient>,
    /// The keys.
    pub keys: KeyStatus,
    /// The tenants, if they are served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenants: Option<TenantStatus>,
    /// The registry, if it is enabled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registry: Option<RegistryStatus>,
}

/// How many keys there are, since the start and now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KeyStatus {
    /// Keys answered with 200, by version of the API.
    pub accepted: BTreeMap<String, u64>,
    /// Keys that were not, by version and reason.
    pub refused: BTreeMap<String, BTreeMap<String, u64>>,
    /// Live keys that have had a handshake, of all domains.
    pub established: usize,
    /// The other live keys.
    pub unestablished: usize,
    /// Keys that wait to be published.
    pub queued: usize,
    /// Keys that are published, and not acknowledged by the MQTT server.
    pub unacknowledged: usize,
    /// Requests that wait for their answer.
    pub waiting: usize,
    /// For how long the oldest of these has waited.
    pub oldest_pending_secs: Option<f64>,
    /// From publishing a key to its confirmation.
    pub confirmation: Durations,
}

/// Durations since the start, counted in buckets.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Durations {
    /// How many.
    pub count: u64,
    /// Half of them were shorter, in seconds.
    pub p50: Option<f64>,
    /// 99 of 100 were shorter, in seconds.
    pub p99: Option<f64>,
    /// How many were at most so long.
    pub buckets: Vec<HistogramBucket>,
}

/// How many durations were at most so long.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct HistogramBucket {
    /// The limit, in seconds.
    pub le: f64,
    /// How many.
    pub count: u64,
}

impl Durations {
    /// Those of a metric.
    #[must_use]
    pub fn of(histogram: &Histogram) -> Self {
        let metric = histogram.metric();
        let found = metric.get_histogram();
        let buckets = found.get_bucket().iter();
        let buckets =
            buckets.map(|bucket| HistogramBucket { le: bucket.upper_bound(), count: bucket.cumulative_count() });
        // The last bucket is for all, and JSON has no infinity.
        Self::counted(found.get_sample_count(), buckets.filter(|bucket| bucket.le.is_finite()).collect())
    }

    fn counted(count: u64, buckets: Vec<HistogramBucket>) -> Self {
        let durations = Self { count, p50: None, p99: None, buckets };
        let (p50, p99) = (durations.quantile(0.5), durations.quantile(0.99));
        Self { p50, p99, ..durations }
    }

    /// Those since it was as `before`; all if that is of another run.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let pairs = self.buckets.iter().zip(&before.buckets);
        let is_later = self.buckets.len() == before.buckets.len()
            && self.count >= before.count
            && pairs.clone().all(|(now, then)| now.count >= then.count);
        if !is_later {
            return self.clone();
        }
        let buckets = pairs.map(|(now, then)| HistogramBucket { le: now.le, count: now.count - then.count });
        Self::counted(self.count - before.count, buckets.collect())
    }

    /// The duration that this part of all does not exceed, by its place in its bucket; the highest limit if it is above that.
    fn quantile(&self, part: f64) -> Option<f64> {
        #[expect(clippy::cast_precision_loss, reason = "counts of keys stay far below 2^52")]
        let number = |count: u64| count as f64;
        let rank = part * number(self.count);
        let at = self.buckets.iter().position(|bucket| bucket.count > 0 && number(bucket.count) >= rank);
        let last = || self.buckets.last().map(|bucket| bucket.le);
        let Some(at) = at else { return last().filter(|_| self.count > 0) };
        let (low, below) = at.checked_sub(1).map_or((0.0, 0), |at| (self.buckets[at].le, self.buckets[at].count));
        let HistogramBucket { le, count } = self.buckets[at];
        Some(low + (le - low) * (rank - number(below)) / number((count - below).max(1)))
    }
}

impl App {
    /// The broker and its fleet now.
    pub fn status(&self, now: Instant) -> Status {
        let not_ready_reason = self.not_ready_reason();
        let (domains, gateways, fleet) = {
            let gateways = self.fleet.gateways();
            (gateways.domain_statuses(), gateways.shown(now), gateways.problems(now))
        };
        let registry = self.registry.as_ref().map(Registry::status);
        let mut problems: Vec<_> =
            self.own_problems(not_ready_reason.as_deref()).into_iter().chain(fleet.all()).collect();
        problems.extend(self.unnamed_proxies.problems());
        problems.extend(self.names_in_use(now));
        problems.extend(registry.as_ref().and_then(registry_problem));
        let refused = self.registry.iter().flat_map(Registry::refused);
        problems.extend(refused.map(|((worker, server), reason)| refused_server(&worker, &server, &reason)));
        problems.extend(self.tenants.iter().flat_map(|tenants| tenants_problems(&tenants.problems())));
        problems.sort();
        problems.dedup();
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_secs: now.saturating_duration_since(self.started).as_secs(),
            ready: not_ready_reason.is_none(),
            problems,
            domains,
            gateways,
            refused_clients: self.client_problems.refused(now),
            keys: self.keys(now),
            tenants: self.tenants.as_ref().map(TenantsHttpState::status),
            registry,
        }
    }

    /// The problems of this broker itself: why it is not ready, its access lists, and what it cannot write to disk.
    fn own_problems(&self, not_ready_reason: Option<&str>) -> Vec<Problem> {
        let not_ready = not_ready_reason.map(|reason| Problem {
            kind: ProblemKind::NotReady,
            subject: String::new(),
            text: format!("not ready: {reason}"),
        });
        let lists = list_problems(&self.exchange.lists.borrow());
        let state = (self.fleet_metrics.state_kept.get() == 0).then(|| Problem {
            kind: ProblemKind::StateNotKept,
            subject: String::new(),
            text: "live keys are not written to disk: a restart of this broker may lose them".into(),
        });
        let is_lost = self.tenants.as_ref().is_some_and(|tenants| !tenants.is_kept());
        let addresses = is_lost.then(|| Problem {
            kind: ProblemKind::StateNotKept,
            subject: "tenants".into(),
            text: "addresses of tenants are not written to disk: after a restart of this broker members may get others"
                .into(),
        });
        not_ready.into_iter().chain(lists).chain(state).chain(addresses).collect()
    }

    /// The client ids of MQTT that two programs use: those of this broker, those of clients of its MQTT server, and
    /// those of gateways that report this.
    pub fn names_in_use(&self, now: Instant) -> Vec<Problem> {
        let problem = |subject: String, text| Problem { kind: ProblemKind::NameInUse, subject, text };
        let own = self.name_suspects.iter().any(|suspect| *suspect.borrow()).then(|| {
            let text = "another program may use the MQTT client ids of this broker: the server ends its connections again \
                        and again";
            problem(String::new(), text.to_owned())
        });
        let of_clients = self.client_problems.ids_in_use(now).into_iter().map(|id| {
            let text = format!("two programs use the MQTT client id {id}: each ends the other's connection");
            problem(id, text)
        });
        own.into_iter().chain(of_clients).chain(self.fleet.gateways().names_in_use()).collect()
    }

    fn keys(&self, now: Instant) -> KeyStatus {
        let accepted = |api: &str| self.metrics.keys_accepted.with_label_values(&[api]).get();
        let refused = |api: &str| {
            let count = |reason: &str| self.metrics.keys_refused.with_label_values(&[api, reason]).get();
            Rejection::VARIANTS.iter().map(|reason| ((*reason).to_owned(), count(reason))).collect()
        };
        let InFlightLoad { queued, unacknowledged, waiting, oldest } = self.exchange.in_flight.lock().load(now);
        let live = self.fleet.live().counts().fold(LiveKeyCounts::default(), |sum, (_, each)| LiveKeyCounts {
            established: sum.established + each.established,
            unestablished: sum.unestablished + each.unestablished,
            ..sum
        });
        KeyStatus {
            accepted: APIS.map(|api| (api.to_owned(), accepted(api))).into(),
            refused: APIS.map(|api| (api.to_owned(), refused(api))).into(),
            established: live.established,
            unestablished: live.unestablished,
            queued,
            unacknowledged,
            waiting,
            oldest_pending_secs: oldest.as_ref().map(Duration::as_secs_f64),
            confirmation: Durations::of(&self.exchange.metrics.confirmation),
        }
    }
}

fn registry_problem(status: &RegistryStatus) -> Option<Problem> {
    let problem = |kind, text| Problem { kind, subject: String::new(), text };
    if let Some(broker) = &status.elsewhere {
        let text = format!(
            "broker {broker} has the registry of this bus, and with SQLite only one can have it: calls of the registry are refused \
             here"
        );
        return Some(problem(ProblemKind::RegistryElsewhere, text));
    }
    if let Some(mark) = &status.emptied {
        let text = format!(
            "the {} of the registry has no tables, but had servers before: its calls are refused, and gateways keep their peers; \
             restore it, or, if it is to be empty, remove {mark} while this broker is stopped",
            status.storage
        );
        return Some(problem(ProblemKind::RegistryEmptied, text));
    }
    (!status.storage_up).then(|| {
        let text = format!("the {} of the registry cannot be used: its calls are refused", status.storage);
        problem(ProblemKind::RegistryUnavailable, text)
    })
}

fn refused_server(worker: &WorkerName, server: &str, reason: &str) -> Problem {
    let text = format!("server {server} of worker {worker} is not taken into the registry: {reason}");
    Problem { kind: ProblemKind::ServerRefused, subject: worker.to_string(), text }
}

fn tenants_problems(TenantProblems { with_other_rules, hub }: &TenantProblems) -> Vec<Problem> {
    let apart = with_other_rules.iter().map(|broker| {
        let text = format!(
            "broker {broker} has other tenants.pool, tenant_length, grace or hub: members there and members here do not see \
             each other"
        );
        Problem { kind: ProblemKind::TenantsApart, subject: broker.to_string(), text }
    });
    apart.chain(hub.iter().map(|(worker, problem)| hub_problem(worker, *problem))).collect()
}

fn hub_problem(worker: &WorkerName, problem: HubProblem) -> Problem {
    let text = match problem {
        HubProblem::Missing => format!("worker {worker}, which tenants.hub names, has not announced a hub"),
        HubProblem::OtherNetworks => {
            format!("the hub of tenants is not used: worker {worker} has other tenants.pool or tenant_length")
        }
    };
    Problem { kind: ProblemKind::TenantsHub, subject: worker.to_string(), text }
}

/// The problems of the access lists.
pub fn list_problems(lists: &ListSnapshot) -> Vec<Problem> {
    let unread = lists.unread.iter().map(|list| Problem {
        kind: ProblemKind::AllowListUnread,
        subject: (*list).to_owned(),
        text: format!(
            "{list} was never read since the start: every key that no admin call allows is refused until it can be read"
        ),
    });
    let damaged = lists.damaged.iter().filter(|list| !lists.unread.contains(list)).map(|list| Problem {
        kind: ProblemKind::ListDamaged,
        subject: (*list).to_owned(),
        text: format!("{list} cannot be read: what was last read of it counts, nothing if it never was"),
    });
    let not_kept = (!lists.is_kept).then(|| Problem {
        kind: ProblemKind::ListsNotKept,
        subject: String::new(),
        text: "list entries made by admin calls are not written to disk: a restart of this broker may lose them".into(),
    });
    unread.chain(damaged).chain(not_kept).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::MetricsRegistry;

    fn seconds(observed: &[f64]) -> Durations {
        let histogram = MetricsRegistry::default().seconds("x", "x").unwrap();
        for seconds in observed {
            histogram.observe(*seconds);
        }
        Durations::of(&histogram)
    }

    #[test]
    fn quantiles_are_between_the_limits_of_their_buckets() {
        let close = |found: Option<f64>, expected: f64| {
            assert!(found.is_some_and(|found| (found - expected).abs() < 1e-9), "{found:?} is not {expected}");
        };
        let none = seconds(&[]);
        assert_eq!((none.count, none.p50, none.p99), (0, None, None));
        let one = seconds(&[0.002]);
        close(one.p50, 0.00175);
        let mixed = seconds(&[vec![0.0005; 50], vec![0.2; 50]].concat());
        close(mixed.p50, 0.001);
        close(mixed.p99, 0.1 + 0.15 * 49.0 / 50.0);
        let beyond = seconds(&[100.0]);
        close(beyond.p99, 10.0);
    }

    #[test]
    fn what_was_counted_before_is_taken_off_unless_it_is_of_another_run() {
        let (before, after) = (seconds(&[0.0005; 9]), seconds(&[vec![0.0005; 9], vec![3.0]].concat()));
        let since = after.since(&before);
        assert_eq!((since.count, since.p50), (1, Some(3.75)));
        assert_eq!(before.since(&after), before, "the broker was restarted");
        assert_eq!(after.since(&Durations::default()), after);
    }

    #[test]
    fn a_list_that_was_never_read_is_one_problem_of_its_own_kind() {
        let lists = ListSnapshot {
            damaged: vec!["allowlist.file", "blacklist_file"],
            unread: vec!["allowlist.file"],
            is_kept: true,
            ..ListSnapshot::default()
        };
        let problems: Vec<_> =
            list_problems(&lists).into_iter().map(|problem| (problem.kind, problem.subject)).collect();
        let unread = (ProblemKind::AllowListUnread, "allowlist.file".to_owned());
        assert_eq!(problems, [unread, (ProblemKind::ListDamaged, "blacklist_file".to_owned())]);
    }
}
