//! The gateways and domains as operators see them: in metrics, on the status page, in its JSON, and in the commands that
//! read that. No key, no IO, no clock: times are ages.

use std::fmt;

use serde::{Deserialize, Serialize};
use wgkex_common::wire::drain::Drain;

use crate::fleet::reach::ReachCounts;

/// The [`GatewayStatus::version`] of a worker of the original.
pub const ORIGINAL: &str = "original";

/// A gateway.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GatewayStatus {
    /// The worker's name.
    pub name: String,
    /// Whether it is online.
    pub online: bool,
    /// Why it gets no new routers; nothing if it does.
    #[serde(default)]
    pub draining: Vec<Draining>,
    /// Its program's version, also while it is offline; [`ORIGINAL`]; none if it is not known.
    pub version: Option<String>,
    /// Why it is offline; none while it is online.
    pub offline: Option<Offline>,
    /// Its domains.
    pub domains: Vec<GatewayDomain>,
    /// Peers of all domains with handshakes, by its last counts.
    pub connected: u64,
    /// The answers that named it since those counts.
    pub assigned: u64,
    /// The routers that this broker answered with it.
    #[serde(default)]
    pub reach: ReachCounts,
    /// Its weight.
    pub weight: f64,
    /// Its part of all weights.
    pub share: f64,
    /// The peers it should have, by its weight.
    pub target: f64,
    /// For how many seconds there has been no MQTT, if all of this is the last known state; none if it is up to date.
    #[serde(default)]
    pub last_known_secs: Option<u64>,
}

/// A drain of a gateway.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Draining {
    /// Where the drain was set.
    pub by: DrainSource,
    /// Since when, until when and why.
    #[serde(flatten)]
    pub drain: Drain,
}

/// Where a drain was set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DrainSource {
    /// The gateway itself.
    Gateway,
    /// The operator of this broker.
    Broker,
}

/// Why a gateway is offline, and since when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offline {
    /// Why.
    pub reason: OfflineReason,
    /// For how many seconds; none if it was so before this broker connected.
    pub for_secs: Option<u64>,
}

/// By which sign a gateway is taken for offline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OfflineReason {
    /// It has published nothing that a gateway at work publishes.
    NeverOnline,
    /// It was stopped.
    Stopped,
    /// The MQTT server has published its last will.
    ConnectionLost,
    /// It published nothing for this many seconds.
    Silent(u64),
}

/// A domain at a gateway.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatewayDomain {
    /// The domain's name.
    pub domain: String,
    /// Whether routers can use it there, as far as the gateway publishes.
    pub state: GatewayDomainState,
    /// Peers with handshakes, by its last count.
    pub connected: u64,
    /// The answers that named it since that count.
    pub assigned: u64,
}

/// The state of a domain, as a gateway publishes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GatewayDomainState {
    /// It has counted its peers.
    Up,
    /// It has not counted its peers so far.
    NotCounted,
    /// It publishes -1: the interface is missing, or it stops; for so many seconds, if this broker has seen that begin.
    Down(Option<u64>),
}

/// A domain that is served here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainGateways {
    /// The domain's name.
    pub name: String,
    /// The gateways that install keys of it now.
    pub gateways: Vec<String>,
}

/// A gateway in the choice for a router of a domain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GatewayRating {
    /// The worker's name.
    pub name: String,
    /// Its part of all weights.
    pub share: f64,
    /// Peers of all domains with handshakes, by its last counts.
    pub connected: u64,
    /// The answers that named it since those counts.
    pub assigned: u64,
    /// The peers it should have, by its weight.
    pub target: f64,
    /// How many it has beyond that: the smallest number is chosen.
    pub distance: f64,
    /// Why it is chosen only where there is no other.
    pub last_resort: Option<String>,
    /// Another reason for a better or worse rank than by its distance.
    #[serde(default)]
    pub note: Option<String>,
    /// Why it cannot be chosen.
    pub unfit: Option<String>,
}

/// A problem that an operator should check.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    /// Its kind.
    pub kind: ProblemKind,
    /// Its subject: a domain, a gateway, several gateways, a list; nothing if it is the broker itself.
    pub subject: String,
    /// One sentence.
    pub text: String,
}

/// The kinds of problems, the worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// The broker cannot serve routers.
    NotReady,
    /// No gateway serves a domain.
    DomainWithoutGateway,
    /// A list of allowed keys was never read, so that every key that is not allowed by a call is refused.
    AllowListUnread,
    /// A list cannot be read.
    ListDamaged,
    /// Live keys are not written to disk.
    StateNotKept,
    /// Entries made by admin calls are not written to disk.
    ListsNotKept,
    /// Two gateways have one key.
    SameKey,
    /// Two gateways have one link address in a domain.
    SameLinkAddress,
    /// Two gateways have one external address and port, and different keys.
    SameExternalAddress,
    /// Two programs use one client id at the MQTT server.
    NameInUse,
    /// A proxy sends requests that `trusted_proxies` does not name.
    ProxyNotTrusted,
    /// Routers that were given a gateway have no handshake there.
    RoutersUnreached,
    /// The clocks of a gateway and this broker differ.
    ClockOff,
    /// A gateway is online and counts the peers of a domain, and no router can be given it, as its data is missing.
    DataMissing,
    /// A gateway is online, and the interface of a domain is missing there.
    DomainDown,
    /// A gateway that the config names is offline.
    GatewayOffline,
    /// Another broker has the registry, and this one refuses its calls.
    RegistryElsewhere,
    /// The database of the registry cannot be used.
    RegistryUnavailable,
    /// The database of the registry is empty, and had servers before.
    RegistryEmptied,
    /// A worker is a server that the registry does not take.
    ServerRefused,
    /// Another broker serves tenants by other rules.
    TenantsApart,
    /// Members do not learn of the hub of tenants.
    TenantsHub,
}

impl ProblemKind {
    /// Whether two gateways publish a value that must be unique.
    #[must_use]
    pub fn is_clash(self) -> bool {
        matches!(self, Self::SameKey | Self::SameLinkAddress | Self::SameExternalAddress)
    }

    /// Whether it is known only while the retained states are.
    #[must_use]
    pub fn needs_states(self) -> bool {
        let of_gateways = matches!(
            self,
            Self::DomainWithoutGateway | Self::DataMissing | Self::DomainDown | Self::GatewayOffline | Self::ClockOff
        );
        self.is_clash() || of_gateways
    }
}

impl GatewayStatus {
    /// Its state in one word.
    #[must_use]
    pub fn state(&self) -> &'static str {
        match self.online {
            false => "offline",
            true if self.draining.is_empty() => "online",
            true => "draining",
        }
    }

    /// Since when its state is the last known one; none if it is up to date.
    #[must_use]
    pub fn last_known(&self) -> Option<String> {
        self.last_known_secs.map(|seconds| format!("last known state: no MQTT for {}", age(seconds)))
    }
}

impl fmt::Display for Draining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by = match self.by {
            DrainSource::Gateway => "",
            DrainSource::Broker => "by this broker, ",
        };
        write!(f, "draining {by}{}", self.drain)
    }
}

impl fmt::Display for OfflineReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NeverOnline => f.write_str("it has not published that it is online"),
            Self::Stopped => f.write_str("stopped"),
            Self::ConnectionLost => f.write_str("connection lost"),
            Self::Silent(seconds) => write!(f, "nothing received for {}", age(*seconds)),
        }
    }
}

impl fmt::Display for Offline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.reason)?;
        match self.for_secs {
            _ if self.reason == OfflineReason::NeverOnline => Ok(()),
            Some(seconds) => write!(f, ", offline for {}", age(seconds)),
            None => f.write_str(", offline since before this broker connected"),
        }
    }
}

impl GatewayDomain {
    /// The connected peers, or why there are none, at a gateway that is online or not.
    #[must_use]
    pub fn note(&self, is_online: bool) -> String {
        match self.state {
            _ if !is_online => "offline".into(),
            GatewayDomainState::Up => self.connected.to_string(),
            GatewayDomainState::NotCounted => "not counted yet".into(),
            GatewayDomainState::Down(None) => "interface missing (-1)".into(),
            GatewayDomainState::Down(Some(seconds)) => format!("interface missing (-1) for {}", age(seconds)),
        }
    }
}

/// A duration for people, as 40 s, 12 min, 3 h 5 min or 2 d 1 h.
#[must_use]
pub fn age(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{minutes} min"),
        7200..172_800 => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

/// The text without characters that control a terminal.
#[must_use]
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_short() {
        let ages = [0, 119, 120, 7_199, 7_200, 172_799, 172_800].map(age);
        assert_eq!(ages, ["0 s", "119 s", "2 min", "119 min", "2 h 0 min", "47 h 59 min", "2 d 0 h"]);
    }

    #[test]
    fn a_domain_at_a_gateway_has_its_peers_or_why_there_are_none() {
        let note = |state, is_online| {
            GatewayDomain { domain: "ff_a".into(), state, connected: 7, assigned: 1 }.note(is_online)
        };
        assert_eq!([note(GatewayDomainState::Up, true), note(GatewayDomainState::Up, false)], ["7", "offline"]);
        assert_eq!(note(GatewayDomainState::Down(Some(150)), true), "interface missing (-1) for 2 min");
        assert_eq!(note(GatewayDomainState::NotCounted, true), "not counted yet");
    }

    #[test]
    fn the_reason_why_a_gateway_is_offline_is_shown_in_words() {
        let text = |reason, for_secs| Offline { reason, for_secs }.to_string();
        assert_eq!(text(OfflineReason::Stopped, Some(7)), "stopped, offline for 7 s");
        assert_eq!(text(OfflineReason::Silent(150), Some(7)), "nothing received for 2 min, offline for 7 s");
        let lost = "connection lost, offline since before this broker connected";
        assert_eq!(text(OfflineReason::ConnectionLost, None), lost);
        assert_eq!(text(OfflineReason::NeverOnline, None), "it has not published that it is online");
    }
}
