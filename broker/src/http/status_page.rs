//! The status page: one table of gateways and two of counts, no key, no script, nothing from elsewhere.

use maud::{DOCTYPE, Markup, html};
use strum::VariantNames as _;

use crate::exchange::Rejection;
use crate::fleet::gateways::{GatewayStatus, Unserved};
use crate::http::metrics::{APIS, Metrics};

const STYLE: &str = "body{font:1rem/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem}\
table{border-collapse:collapse;margin:0 0 2rem}th,td{border-bottom:1px solid #ccc;padding:.2rem .8rem;text-align:left}\
td.n,th.n{text-align:right}.bad{color:#b00020}.good{color:#1b7a32}";

/// The whole page. `unready` is why this broker cannot serve routers now.
pub fn render(gateways: &[GatewayStatus], unserved: &[Unserved], unready: Option<&str>, metrics: &Metrics) -> String {
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
                "Broker " (env!("CARGO_PKG_VERSION")) ": "
                @match unready {
                    None => span.good { "ready" },
                    Some(reason) => span.bad { "not ready: " (reason) },
                }
            }
            h2 { "Gateways" }
            @for unserved in unserved { p.bad { (unserved) } }
            (table_of_gateways(gateways))
            h2 { "Keys" }
            (table_of_keys(metrics))
        }
    };
    page.into_string()
}

fn table_of_gateways(gateways: &[GatewayStatus]) -> Markup {
    html! {
        table {
            tr {
                th { "Gateway" } th { "State" } th { "Version" } th { "Domains (connected peers)" }
                th.n { "Peers" } th.n { "Weight" } th.n { "Target" }
            }
            @if gateways.is_empty() { tr { td colspan="7" { "none was heard of" } } }
            @for gateway in gateways { (row_of_gateway(gateway)) }
        }
    }
}

fn row_of_gateway(GatewayStatus { worker, online, version, domains, peers, weight, target }: &GatewayStatus) -> Markup {
    let (class, state) = if *online { ("good", "online") } else { ("bad", "offline") };
    html! {
        tr {
            td { (worker.as_str()) }
            td class=(class) { (state) }
            td { (version.as_deref().unwrap_or("original")) }
            td {
                @for (number, (domain, peers)) in domains.iter().enumerate() {
                    @if number > 0 { ", " }
                    (domain.name()) " ("
                    @match peers { Some(peers) => (peers), None => "offline" }
                    ")"
                }
            }
            td.n { (peers) }
            td.n { (weight) }
            td.n { (format_args!("{target:.1}")) }
        }
    }
}

fn table_of_keys(metrics: &Metrics) -> Markup {
    let accepted = |api| metrics.keys_accepted.with_label_values(&[api]).get();
    let refused = |api, reason| metrics.keys_refused.with_label_values(&[api, reason]).get();
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

#[cfg(test)]
mod tests {
    use wgkex_common::Domain;

    use super::*;
    use crate::metrics::Registry;

    #[test]
    fn the_page_shows_gateways_and_counts_and_no_markup_of_strangers() {
        let domain = Domain::new("ff_a", &["ff_".into()]).unwrap();
        let gateway = GatewayStatus {
            worker: "<script>".parse().unwrap(),
            online: true,
            version: None,
            domains: [(domain, Some(7)), (Domain::new("ff_c", &["ff_".into()]).unwrap(), None)].into(),
            peers: 7,
            weight: 84.0,
            target: 9.5,
        };
        let metrics = Metrics::register(&Registry::default()).unwrap();
        metrics.keys_accepted.with_label_values(&["v2"]).inc_by(41);
        let unserved = Unserved { domain: Domain::new("ff_b", &["ff_".into()]).unwrap(), is_known: true };
        let page = render(&[gateway], &[unserved], Some("<b>"), &metrics);
        for part in [
            "&lt;script&gt;",
            "online",
            "original",
            "ff_a (7), ff_c (offline)",
            "<td>refused: not confirmed</td>",
            ">84<",
            ">9.5<",
            ">41<",
            "not ready: &lt;b&gt;",
            "domain ff_b: no gateway",
        ] {
            assert!(page.contains(part), "{part} is missing in {page}");
        }
        assert!(!page.contains("<script") && !page.contains("<b>"));
        let empty = render(&[], &[], None, &metrics);
        assert!(empty.contains("none was heard of") && empty.contains(">ready<"), "{empty}");
    }
}
