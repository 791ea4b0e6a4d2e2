//! The metrics of tenants, without their ids.

use prometheus::{Error, IntCounter, IntCounterVec, IntGauge};
use serde::{Deserialize, Serialize};
use strum::{IntoStaticStr, VariantNames};

use crate::metrics::{MetricsRegistry, set};
use crate::tenants::close::CloseCause;
use crate::tenants::pool::TenantCounts;

/// Clones count into the same ones.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// WebSockets that are open, with or without a member.
    pub sockets: IntGauge,
    /// Tenants that have a network.
    pub tenants: IntGauge,
    /// Their members.
    pub members: IntGauge,
    /// Addresses that are held for members that left.
    pub held: IntGauge,
    /// Members so far.
    pub joins: IntCounter,
    /// WebSockets that were closed instead, by reason.
    pub refused: IntCounterVec,
    /// Members that left, by reason.
    pub leaves: IntCounterVec,
    /// Whether the addresses are kept on the disk.
    pub state_kept: IntGauge,
    /// Whether this broker gives the addresses of all brokers' tenants.
    pub coordinator: IntGauge,
}

/// Why a member leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr, VariantNames)]
#[strum(serialize_all = "snake_case")]
pub enum Leave {
    /// It closed its WebSocket, or lost the connection.
    Closed,
    /// It sent a message that is not allowed.
    Refused,
    /// It does not answer.
    Silent,
    /// It does not read.
    Slow,
}

/// How many there are, for the status.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantStatus {
    /// Tenants that have a network.
    pub tenants: u64,
    /// Their members.
    pub members: u64,
    /// Addresses that are held for members that left.
    pub held: u64,
    /// WebSockets that are open.
    pub sockets: u64,
}

impl Metrics {
    /// Registers them, each at 0.
    pub fn register(registry: &MetricsRegistry) -> Result<Self, Error> {
        let gauge = |name: &str, help| registry.gauge(&format!("wgkex_broker_tenants_{name}"), help);
        Ok(Self {
            sockets: gauge("sockets", "WebSockets of tenants that are open")?,
            tenants: gauge("networks", "Tenants that have a network, at all brokers of the bus")?,
            members: gauge("members", "Members of tenants, at all brokers of the bus")?,
            held: gauge("held_addresses", "Addresses held for members that left, at all brokers of the bus")?,
            joins: registry.counter("wgkex_broker_tenants_joins_total", "Clients that became members of a tenant")?,
            refused: registry.counters_of(
                "wgkex_broker_tenants_refused_total",
                "WebSockets of tenants that were closed without a member",
                "reason",
                CloseCause::VARIANTS,
            )?,
            leaves: registry.counters_of(
                "wgkex_broker_tenants_leaves_total",
                "Members that left their tenant",
                "reason",
                Leave::VARIANTS,
            )?,
            coordinator: gauge(
                "coordinator",
                "1 if this broker gives the addresses of tenants, at all brokers of the bus",
            )?,
            state_kept: gauge("state_kept", "1 if the addresses of tenants are kept on the disk, 0 if not")?,
        })
    }

    /// How many there are now.
    pub fn set(&self, counts: TenantCounts) {
        let TenantCounts { tenants, members, held } = counts;
        set(&self.tenants, tenants);
        set(&self.members, members);
        set(&self.held, held);
    }

    /// The same for the status.
    pub fn status(&self) -> TenantStatus {
        let number = |gauge: &IntGauge| u64::try_from(gauge.get()).unwrap_or_default();
        TenantStatus {
            tenants: number(&self.tenants),
            members: number(&self.members),
            held: number(&self.held),
            sockets: number(&self.sockets),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::assert_has;

    #[test]
    fn every_series_is_there_from_the_start() {
        let registry = MetricsRegistry::default();
        Metrics::register(&registry).unwrap();
        assert_has(
            &registry,
            &[
                "wgkex_broker_tenants_members 0",
                r#"wgkex_broker_tenants_refused_total{reason="join_timeout"} 0"#,
                r#"wgkex_broker_tenants_refused_total{reason="key_in_use"} 0"#,
                r#"wgkex_broker_tenants_leaves_total{reason="silent"} 0"#,
            ],
        );
    }
}
