//! What `where` and `explain` print for people.

use std::fmt::Write as _;

use wgkex_common::style::{Colour, Style};
use wgkex_common::time_text::utc;

use crate::cli::table::{Cell, table};
use crate::fleet::live_keys::KeyState;
use crate::fleet::status::{age, printable};
use crate::http::key_reports::{
    ExplainReport, ExplainedDomain, InFlightKey, KeyAdmission, KeyInDomain, ListedKey, WhereReport,
};

/// Where a key is: a few lines for each domain.
pub fn found(report: &WhereReport) -> String {
    let WhereReport { key: _, domains, lists } = report;
    let mut text = String::new();
    if domains.iter().all(|found| found.state.is_none() && found.in_flight.is_none()) {
        text.push_str(
            "no router has sent this key here since it was last forgotten or denied, and no gateway has reported it\n",
        );
    }
    for domain in domains {
        in_domain(&mut text, domain);
    }
    for listed in lists {
        let _ = writeln!(text, "{}", printable(&on_list(listed)));
    }
    text
}

fn in_domain(text: &mut String, found: &KeyInDomain) {
    let KeyInDomain { domain, state, access, first_secs, last_secs, last_handshake_secs, .. } = found;
    let _ = writeln!(text, "{}: {}{}", printable(domain), state_text(*state), admission_text(*access));
    let ago = |seconds: &Option<u64>| seconds.map(|seconds| format!("{} ago", age(seconds)));
    let at = found.last_handshake_at.as_deref().map_or(String::new(), |gateway| format!(" at {gateway}"));
    let confirmed: Vec<_> = found
        .confirmed_by
        .iter()
        .map(|each| if each.online { each.gateway.clone() } else { format!("{} (offline)", each.gateway) })
        .collect();
    let confirmed = (!confirmed.is_empty()).then(|| {
        let last = ago(&found.confirmed_secs).map_or(String::new(), |ago| format!(", last {ago}"));
        format!("{}{last}", confirmed.join(", "))
    });
    let lines = [
        ("known since", ago(first_secs)),
        ("last sent by its router, or connected", ago(last_secs)),
        ("last handshake reported", ago(last_handshake_secs).map(|ago| format!("{ago}{at}"))),
        ("confirmed by", confirmed),
    ];
    for (what, value) in lines {
        if let Some(value) = value {
            let _ = writeln!(text, "  {what}: {}", printable(&value));
        }
    }
    if found.state.is_some_and(|state| state != KeyState::Claimed) && found.confirmed_by.is_empty() {
        text.push_str("  confirmed by no gateway since this broker started (one that took it from a snapshot does not report that)\n");
    }
    if let Some(flight) = &found.in_flight {
        let _ = writeln!(text, "  in flight: {}", printable(&in_flight(flight)));
    }
}

fn state_text(state: Option<KeyState>) -> &'static str {
    match state {
        Some(KeyState::Established) => "live, established",
        Some(KeyState::Unestablished) => "live, never connected",
        Some(KeyState::Displaced) => "established, but another key has its address now",
        Some(KeyState::Claimed) => "not live: no router has sent it, but a gateway reports handshakes",
        None => "not live",
    }
}

fn admission_text(admission: KeyAdmission) -> &'static str {
    match admission {
        KeyAdmission::Allowed => "",
        KeyAdmission::Trusted => ", trusted",
        KeyAdmission::NotAllowlisted => ", refused: not on the list allow",
        KeyAdmission::Denied => ", denied",
    }
}

fn in_flight(flight: &InFlightKey) -> String {
    let InFlightKey { queued_secs, unacknowledged, waiting, late_secs, outcomes } = flight;
    let outcomes = outcomes.iter().map(|(gateway, outcome)| format!("{gateway}: {outcome}"));
    let parts = [
        queued_secs.map(|seconds| format!("queued for {}", age(seconds))),
        (*unacknowledged > 0).then(|| format!("{unacknowledged} publications not acknowledged")),
        (*waiting > 0).then(|| format!("{waiting} requests wait")),
        late_secs.map(|seconds| format!("late: its request timed out {} ago", age(seconds))),
    ];
    let parts: Vec<_> = parts.into_iter().flatten().chain(outcomes).collect();
    if parts.is_empty() { "answered just now".into() } else { parts.join(", ") }
}

fn on_list(ListedKey { list, source, domain, name, reason, until }: &ListedKey) -> String {
    let fields = [
        ("by", Some(source.clone())),
        ("domain", domain.clone()),
        ("name", name.clone()),
        ("until", until.map(utc)),
        ("reason", reason.clone()),
    ];
    let fields = fields.into_iter().filter_map(|(field, value)| Some(format!("  {field}: {}", value?)));
    format!("on the list {list}{}", fields.collect::<String>())
}

/// The outcome that a request for a key would have: a table for each domain, and where the key is now.
pub fn explained(report: &ExplainReport, style: Style) -> String {
    let domains = report.domains.iter().map(|domain| explained_domain(domain, style));
    format!("{}\nnow:\n{}", domains.collect::<Vec<_>>().join("\n"), found(&report.now))
}

fn explained_domain(explained: &ExplainedDomain, style: Style) -> String {
    let ExplainedDomain { domain, refused, gateway, why, is_new, standings } = explained;
    let mut text = String::new();
    let domain = printable(domain);
    if let Some(refused) = refused {
        let line = format!("{domain}: refused with {} ({}): {}", refused.status, refused.reason, refused.detail);
        let _ = writeln!(text, "{}", style.paint(Colour::Bad, &printable(&line)));
    }
    if let (Some(gateway), Some(why)) = (gateway, why) {
        let would = if refused.is_some() { "would otherwise get" } else { "would get" };
        let _ = writeln!(text, "{}", printable(&format!("{domain}: {would} {gateway}, as {why}")));
    }
    if *is_new {
        let _ = writeln!(
            text,
            "{domain}: the key is not live here, so the limits of new keys count, also that of its address"
        );
    }
    let row = |each: &crate::fleet::status::GatewayRating| {
        let is_chosen = gateway.as_ref() == Some(&each.name);
        let note = match (&each.unfit, &each.last_resort) {
            (Some(unfit), _) => format!("not possible: {unfit}"),
            (None, _) if is_chosen => "chosen".into(),
            (None, Some(reason)) => format!("last resort: {reason}"),
            (None, None) => each.note.clone().unwrap_or_default(),
        };
        let colour = if is_chosen { Colour::Good } else { Colour::Plain };
        [
            Cell::text(&each.name).coloured(colour),
            Cell::number(&format!("{:.1}%", each.share * 100.0)),
            Cell::number(&each.connected),
            Cell::number(&each.assigned),
            Cell::number(&format!("{:.1}", each.target)),
            Cell::number(&format!("{:+.1}", each.distance)),
            Cell::text(&note).coloured(colour),
        ]
    };
    let rows: Vec<_> = standings.iter().map(row).collect();
    text + &table(["GATEWAY", "SHARE", "CONNECTED", "ASSIGNED", "TARGET", "DISTANCE", "NOTE"], &rows, style)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const KEY: &str = "TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=";

    #[test]
    fn where_a_key_is_is_a_few_lines() {
        let report = json!({
            "key": KEY,
            "domains": [{
                "domain": "ff_a", "state": "established", "access": "denied", "first_secs": 7300, "last_secs": 12,
                "last_handshake_secs": 12, "last_handshake_at": "gw2", "confirmed_secs": 90,
                "confirmed_by": [{ "gateway": "gw1", "online": true }, { "gateway": "gw2", "online": false }],
                "in_flight": {
                    "queued_secs": 3, "unacknowledged": 1, "waiting": 2, "late_secs": 40,
                    "outcomes": { "gw1": "installed", "gw3": "full" },
                },
            }],
            "lists": [{
                "list": "deny", "source": "admin", "domain": null, "name": "attic", "reason": "x\u{1b}", "until": 0,
            }],
        });
        let expected = "ff_a: live, established, denied\n\
            \x20 known since: 2 h 1 min ago\n\
            \x20 last sent by its router, or connected: 12 s ago\n\
            \x20 last handshake reported: 12 s ago at gw2\n\
            \x20 confirmed by: gw1, gw2 (offline), last 90 s ago\n\
            \x20 in flight: queued for 3 s, 1 publications not acknowledged, 2 requests wait, late: its request timed out 40 s \
            ago, gw1: installed, gw3: full\n\
            on the list deny  by: admin  name: attic  until: 1970-01-01T00:00:00Z  reason: x?\n";
        assert_eq!(found(&serde_json::from_value(report).unwrap()), expected);
        let nothing = json!({ "key": KEY, "domains": [], "lists": [] });
        let expected =
            "no router has sent this key here since it was last forgotten or denied, and no gateway has reported it\n";
        assert_eq!(found(&serde_json::from_value(nothing).unwrap()), expected);
    }

    #[test]
    fn an_explanation_has_the_numbers_of_each_gateway() {
        let standing = |name: &str, unfit: Option<&str>| {
            json!({
                "name": name, "share": 0.5, "connected": 3, "assigned": 1, "target": 6.0, "distance": -2.0,
                "last_resort": null, "unfit": unfit,
            })
        };
        let report = json!({
            "key": KEY,
            "domains": [{
                "domain": "ff_a", "gateway": "gw1", "why": "it is the furthest below its target: -2.0", "is_new": true,
                "refused": { "status": 403, "reason": "denied", "message": "no", "detail": "it is on the list deny by admin" },
                "standings": [standing("gw1", None), standing("gw2", Some("offline: stopped"))],
            }],
            "where": { "key": KEY, "domains": [], "lists": [] },
        });
        let expected = "ff_a: refused with 403 (denied): it is on the list deny by admin\n\
            ff_a: would otherwise get gw1, as it is the furthest below its target: -2.0\n\
            ff_a: the key is not live here, so the limits of new keys count, also that of its address\n\
            GATEWAY  SHARE  CONNECTED  ASSIGNED  TARGET  DISTANCE  NOTE\n\
            gw1      50.0%          3         1     6.0      -2.0  chosen\n\
            gw2      50.0%          3         1     6.0      -2.0  not possible: offline: stopped\n\
            \n\
            now:\n\
            no router has sent this key here since it was last forgotten or denied, and no gateway has reported it\n";
        assert_eq!(explained(&serde_json::from_value(report).unwrap(), Style::Plain), expected);
    }
}
