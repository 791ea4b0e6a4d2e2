//! The status page: problems, tables of gateways and of counts, no key, no tenant, no script, nothing from elsewhere.

use maud::{DOCTYPE, Markup, html};
use strum::VariantNames as _;

use crate::exchange::Rejection;
use crate::fleet::status::{GatewayDomain, GatewayStatus, age};
use crate::http::metrics::APIS;
use crate::http::status::{KeyStatus, Status};
use crate::mqtt_server::RefusedClient;
use crate::registry::RegistryStatus;
use crate::tenants::TenantStatus;

const STYLE: &str = "body{font:1rem/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem}\
table{border-collapse:collapse;margin:0 0 2rem}th,td{border-bottom:1px solid #ccc;padding:.2rem .8rem;text-align:left}\
td.n,th.n{text-align:right}.bad{color:#b00020}.good{color:#1b7a32}small{color:#555}";

/// The whole page.
pub fn render(status: &Status) -> String {
    let Status {
        version,
        pid: _,
        uptime_secs,
        ready,
        problems,
        domains: _,
        gateways,
        refused_clients,
        keys,
        tenants,
        registry,
    } = status;
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            meta charset="utf-8";
            meta name="viewport" content="width=device-width";
            meta http-equiv="refresh" content="10";
            title { "wgkex" }
            style { (STYLE) }
            h1 { "wgkex" }
            p {
                "Broker " (version) ", up for " (age(*uptime_secs)) ": "
                @if *ready { span.good { "ready" } } @else { span.bad { "cannot serve routers" } }
            }
            @for problem in problems { p.bad { (problem.text) } }
            h2 { "Gateways" }
            (table_of_gateways(gateways))
            h2 { "Keys" }
            (table_of_keys(keys))
            (now(keys))
            @if !refused_clients.is_empty() { (table_of_refused(refused_clients)) }
            @if let Some(tenants) = tenants { (table_of_tenants(tenants)) }
            @if let Some(registry) = registry { (table_of_registry(registry)) }
        }
    };
    page.into_string()
}

fn table_of_gateways(gateways: &[GatewayStatus]) -> Markup {
    html! {
        table {
            tr {
                th { "Gateway" } th { "State" } th { "Version" } th { "Domains (connected peers)" }
                th.n { "Connected" } th.n { "Assigned" } th.n { "Unreached" } th.n { "Weight" } th.n { "Target" }
            }
            @if gateways.is_empty() { tr { td colspan="9" { "no gateway is known" } } }
            @for gateway in gateways { (row_of_gateway(gateway)) }
        }
        p { small {
            "Connected: peers with handshakes, as the gateway counts them every minute. "
            "Assigned: answers that named it since that count, those of other brokers estimated. "
            "Unreached: routers that still request it 5 minutes after they were given it, and have no handshake there. "
            "Target: the peers that it should have, its part of all weights times the peers of all gateways that are online; "
            "the next router gets the gateway that is furthest below its target."
        } }
    }
}

fn row_of_gateway(gateway: &GatewayStatus) -> Markup {
    let GatewayStatus {
        name,
        online,
        draining,
        version,
        offline,
        domains,
        connected,
        assigned,
        reach,
        weight,
        share: _,
        target,
        last_known_secs: _,
    } = gateway;
    html! {
        tr {
            td { (name) }
            @if let Some(last_known) = gateway.last_known() {
                td { (gateway.state()) " (" (last_known) ")" }
            } @else if *online && !draining.is_empty() {
                td { @for (number, each) in draining.iter().enumerate() { @if number > 0 { "; " } (each) } }
            } @else if *online { td.good { "online" } } @else {
                td.bad { "offline" @if let Some(offline) = offline { ": " (offline) } }
            }
            td { (version.as_deref().unwrap_or("unknown")) }
            td { @for (number, domain) in domains.iter().enumerate() { @if number > 0 { ", " } (domain_of_gateway(domain, *online)) } }
            td.n { (connected) }
            td.n { (assigned) }
            td.n { (reach.unreached) }
            td.n { (weight) }
            td.n { (format_args!("{target:.1}")) }
        }
    }
}

fn domain_of_gateway(domain: &GatewayDomain, is_online: bool) -> Markup {
    html! {
        (domain.domain) " (" (domain.note(is_online)) ")"
    }
}

fn table_of_keys(keys: &KeyStatus) -> Markup {
    let accepted = |api| keys.accepted.get(api).copied().unwrap_or_default();
    let refused = |api, reason| keys.refused.get(api).and_then(|by| by.get(reason)).copied().unwrap_or_default();
    html! {
        table {
            tr { th {} th.n { "v1" } th.n { "v2" } }
            tr { td { "accepted" } @for api in APIS { td.n { (accepted(api)) } } }
            @for reason in Rejection::VARIANTS.iter().copied() {
                tr {
                    td { "refused: " (reason.replace('_', " ")) }
                    @for api in APIS { td.n { (refused(api, reason)) } }
                }
            }
        }
    }
}

/// The clients that the MQTT server refused last.
fn table_of_refused(clients: &[RefusedClient]) -> Markup {
    let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
    html! {
        h2 { "Refused MQTT clients" }
        table {
            tr { th { "User" } th { "Client id" } th { "Why" } th.n { "Times" } th.n { "Last" } }
            @for RefusedClient { user, client, reason: _, cause, count, last_secs } in clients {
                tr {
                    td { (or_none(user)) } td { (or_none(client)) } td { (cause) } td.n { (count) }
                    td.n { (age(*last_secs)) " ago" }
                }
            }
        }
    }
}

/// The table of keys and requests now.
fn now(keys: &KeyStatus) -> Markup {
    let seconds = |seconds: Option<f64>| seconds.map_or("-".to_owned(), |seconds| format!("{seconds:.3} s"));
    let rows = [
        ("live keys that have had a handshake", keys.established.to_string()),
        ("other live keys", keys.unestablished.to_string()),
        ("keys that wait to be published", keys.queued.to_string()),
        ("requests that wait", keys.waiting.to_string()),
        ("the oldest of them has waited", seconds(keys.oldest_pending_secs)),
        ("confirmation, median", seconds(keys.confirmation.p50)),
        ("confirmation, 99 of 100", seconds(keys.confirmation.p99)),
    ];
    html! { table { @for (what, value) in rows { tr { td { (what) } td.n { (value) } } } } }
}

fn table_of_tenants(tenants: &TenantStatus) -> Markup {
    let TenantStatus { tenants, members, held, sockets } = tenants;
    let rows = [
        ("tenants that have a network", tenants),
        ("their members", members),
        ("addresses held for members that left", held),
        ("open WebSockets", sockets),
    ];
    html! { h2 { "Tenants" } table { @for (what, count) in rows { tr { td { (what) } td.n { (count) } } } } }
}

fn table_of_registry(registry: &RegistryStatus) -> Markup {
    let RegistryStatus { storage, storage_up, elsewhere, emptied, servers, leases } = registry;
    let state = match elsewhere {
        Some(broker) => format!("refused here: broker {broker} has it"),
        None if *storage_up => "up".to_owned(),
        None if emptied.is_some() => "empty, but had servers before".to_owned(),
        None => "cannot be used".to_owned(),
    };
    html! {
        h2 { "Registry" }
        table {
            tr { td { (storage) } td { (state) } }
            tr { td { "servers" } td.n { (servers) } }
            tr { td { "addresses that clients lease" } td.n { (leases) } }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::reach::ReachCounts;
    use wgkex_common::wire::drain::Drain;

    use crate::fleet::status::{
        DrainSource, Draining, GatewayDomainState, Offline, OfflineReason, Problem, ProblemKind,
    };
    use crate::http::status::Durations;

    fn status(ready: bool, problems: Vec<Problem>, gateways: Vec<GatewayStatus>) -> Status {
        let keys = KeyStatus {
            accepted: [("v2".to_owned(), 41)].into(),
            refused: [].into(),
            established: 3,
            unestablished: 4,
            queued: 0,
            unacknowledged: 0,
            waiting: 0,
            oldest_pending_secs: None,
            confirmation: Durations { p99: Some(0.25), ..Durations::default() },
        };
        let refused = RefusedClient {
            user: Some("<u>gw1".into()),
            client: None,
            reason: "password".into(),
            cause: "wrong password".into(),
            count: 3,
            last_secs: 40,
        };
        let tenants = Some(TenantStatus { tenants: 2, members: 31, held: 1, sockets: 33 });
        Status {
            version: "9".into(),
            pid: 1,
            uptime_secs: 7,
            ready,
            problems,
            domains: Vec::new(),
            gateways,
            refused_clients: vec![refused],
            keys,
            tenants,
            registry: Some(RegistryStatus {
                storage: "SQLite".into(),
                storage_up: true,
                elsewhere: None,
                emptied: None,
                servers: 4,
                leases: 97,
            }),
        }
    }

    #[test]
    fn the_page_shows_gateways_and_counts_and_no_markup_of_strangers() {
        let domain = |domain: &str, state| GatewayDomain { domain: domain.into(), state, connected: 7, assigned: 5 };
        let online = GatewayStatus {
            name: "<script>".into(),
            online: true,
            draining: Vec::new(),
            version: Some("original".into()),
            offline: None,
            domains: vec![domain("ff_a", GatewayDomainState::Up), domain("ff_c", GatewayDomainState::Down(Some(9)))],
            connected: 7,
            assigned: 5,
            reach: ReachCounts { unreached: 6, ..ReachCounts::default() },
            weight: 84.0,
            share: 0.5,
            target: 9.5,
            last_known_secs: None,
        };
        let offline = GatewayStatus {
            name: "gone".into(),
            online: false,
            version: Some("1.2.3".into()),
            offline: Some(Offline { reason: OfflineReason::ConnectionLost, for_secs: Some(180) }),
            ..online.clone()
        };
        let drain = Drain { since: 0, until: None, reason: Some("<i>kernel".into()), deadline: None };
        let draining = GatewayStatus {
            name: "gw2".into(),
            draining: vec![Draining { by: DrainSource::Gateway, drain }],
            ..online.clone()
        };
        let away = GatewayStatus { name: "gw3".into(), last_known_secs: Some(40), ..online.clone() };
        let problem = |text: &str| Problem { kind: ProblemKind::NotReady, subject: String::new(), text: text.into() };
        let problems = vec![problem("not ready: <b>"), problem("domain ff_b: no gateway is online")];
        let page = render(&status(false, problems, vec![online, offline, draining, away]));
        for part in [
            "&lt;script&gt;",
            ">online<",
            "original",
            "ff_a (7), ff_c (interface missing (-1) for 9 s)",
            ">offline: connection lost, offline for 3 min<",
            ">1.2.3<",
            "<td>online (last known state: no MQTT for 40 s)</td>",
            ">draining since 1970-01-01T00:00:00Z: &lt;i&gt;kernel<",
            "<td>refused: not confirmed</td>",
            r#"<td>their members</td><td class="n">31</td>"#,
            r#"<td class="n">7</td><td class="n">5</td><td class="n">6</td><td class="n">84</td><td class="n">9.5</td>"#,
            ">41<",
            ">0.250 s<",
            "not ready: &lt;b&gt;",
            "cannot serve routers",
            "domain ff_b: no gateway",
            "Target: the peers that it should have",
            r#"<td>&lt;u&gt;gw1</td><td>-</td><td>wrong password</td><td class="n">3</td><td class="n">40 s ago</td>"#,
        ] {
            assert!(page.contains(part), "{part} is missing in {page}");
        }
        assert!(!page.contains("<script") && !page.contains("<b>"));
        let empty = render(&status(true, Vec::new(), Vec::new()));
        assert!(empty.contains("no gateway is known") && empty.contains(">ready<"), "{empty}");
    }
}
