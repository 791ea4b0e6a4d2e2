//! The status page: one table of gateways and two of counts, no key, no script, nothing from elsewhere.

use std::fmt::Write as _;

use crate::exchange::Refusal;
use crate::fleet::gateways::{Overview, Unserved};
use crate::metrics::{APIS, Metrics};

const HEAD: &str = "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\">\
<meta name=\"viewport\" content=\"width=device-width\"><meta http-equiv=\"refresh\" content=\"10\"><title>wgkex</title>\
<style>body{font:1rem/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem}\
table{border-collapse:collapse;margin:0 0 2rem}th,td{border-bottom:1px solid #ccc;padding:.2rem .8rem;text-align:left}\
td.n,th.n{text-align:right}.bad{color:#b00020}.good{color:#1b7a32}</style>";

/// The whole page. `unready` is why this broker cannot serve routers now.
pub fn render(gateways: &[Overview], unserved: &[Unserved], unready: Option<&str>, metrics: &Metrics) -> String {
    let mut page = String::from(HEAD);
    let version = env!("CARGO_PKG_VERSION");
    let state = unready.map_or_else(
        || "<span class=\"good\">ready</span>".to_owned(),
        |reason| format!("<span class=\"bad\">not ready: {}</span>", escape(reason)),
    );
    // Writing to a String does not fail.
    let _ = write!(page, "<h1>wgkex</h1><p>Broker {version}: {state}</p><h2>Gateways</h2>");
    for unserved in unserved {
        let _ = write!(page, "<p class=\"bad\">{}</p>", escape(&unserved.to_string()));
    }
    write_gateways(&mut page, gateways);
    write_keys(&mut page, metrics);
    page
}

fn write_gateways(page: &mut String, gateways: &[Overview]) {
    page.push_str(
        "<table><tr><th>Gateway<th>State<th>Version<th>Domains (connected peers)\
         <th class=\"n\">Peers<th class=\"n\">Weight<th class=\"n\">Target</tr>",
    );
    if gateways.is_empty() {
        page.push_str("<tr><td colspan=\"7\">none was heard of</tr>");
    }
    for Overview { worker, online, version, domains, peers, weight, target } in gateways {
        let state = if *online { "<td class=\"good\">online" } else { "<td class=\"bad\">offline" };
        let domains: Vec<String> = domains
            .iter()
            .map(|(domain, peers)| {
                format!("{} ({})", escape(domain.name()), peers.map_or("offline".into(), |peers| peers.to_string()))
            })
            .collect();
        let _ = write!(
            page,
            "<tr><td>{}{state}<td>{}<td>{}<td class=\"n\">{peers}<td class=\"n\">{weight}<td class=\"n\">{target:.1}</tr>",
            escape(worker),
            version.as_deref().map_or("original".into(), escape),
            domains.join(", "),
        );
    }
    page.push_str("</table>");
}

fn write_keys(page: &mut String, metrics: &Metrics) {
    page.push_str("<h2>Keys</h2><table><tr><th><th class=\"n\">v1<th class=\"n\">v2</tr>");
    let mut row = |name: &str, count: &dyn Fn(&str) -> u64| {
        let _ = write!(page, "<tr><td>{name}");
        for api in APIS {
            let _ = write!(page, "<td class=\"n\">{}", count(api));
        }
        page.push_str("</tr>");
    };
    row("accepted", &|api| metrics.keys_accepted.with_label_values(&[api]).get());
    for reason in Refusal::REASONS {
        let name = format!("refused: {}", reason.replace('_', " "));
        row(&name, &|api| metrics.keys_refused.with_label_values(&[api, reason]).get());
    }
    page.push_str("</table></html>");
}

/// Text as HTML shows it, wherever it came from.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            char => escaped.push(char),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use wgkex_common::Domain;

    use super::*;

    #[test]
    fn the_page_shows_gateways_and_counts_and_no_markup_of_strangers() {
        let domain = Domain::new("ff_a", &["ff_".into()]).unwrap();
        let gateway = Overview {
            worker: "<script>".into(),
            online: true,
            version: None,
            domains: [(domain, Some(7))].into(),
            peers: 7,
            weight: 84.0,
            target: 9.5,
        };
        let metrics = Metrics::new().unwrap();
        metrics.keys_accepted.with_label_values(&["v2"]).inc_by(41);
        let unserved = Unserved { domain: Domain::new("ff_b", &["ff_".into()]).unwrap(), is_known: true };
        let page = render(&[gateway], &[unserved], Some("<b>"), &metrics);
        for part in [
            "&lt;script&gt;",
            "online",
            "original",
            "ff_a (7)",
            ">84<",
            ">9.5<",
            ">41<",
            "not ready: &lt;b&gt;",
            "domain ff_b: no gateway",
        ] {
            assert!(page.contains(part), "{part} is missing in {page}");
        }
        assert!(!page.contains("<script"));
    }
}
