//! By which interfaces this machine reaches the internet: those of the default routes, of IPv4 and IPv6.

use std::collections::BTreeSet;
use std::fs;

use crate::doctor::facts::Uplink;

pub(super) fn find() -> BTreeSet<Uplink> {
    let read = |file: &str| fs::read_to_string(format!("/proc/self/net/{file}")).unwrap_or_default();
    let (ipv4, ipv6) = (ipv4(&read("route")), ipv6(&read("ipv6_route")));
    let names: BTreeSet<String> = [ipv4, ipv6.clone()].into_iter().flatten().collect();
    names.into_iter().filter_map(|name| uplink(name, ipv6.as_deref())).collect()
}

fn uplink(name: String, ipv6: Option<&str>) -> Option<Uplink> {
    let mtu = fs::read_to_string(format!("/sys/class/net/{name}/mtu")).ok()?.trim().parse().ok()?;
    Some(Uplink { has_ipv6: ipv6 == Some(name.as_str()), name, mtu })
}

/// The interface of the best default route in the table `/proc/net/route`: interface, destination, ..., metric as the
/// seventh field.
fn ipv4(table: &str) -> Option<String> {
    let routes = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let defaults = routes.filter(|fields| fields.get(1) == Some(&"00000000"));
    let metric = |fields: &Vec<&str>| fields.get(6).and_then(|metric| metric.parse().ok()).unwrap_or(u32::MAX);
    Some((*defaults.min_by_key(metric)?.first()?).to_owned())
}

/// The interface of the best default route in the table `/proc/net/ipv6_route`: destination, its length, ..., metric as
/// the sixth field, interface as the tenth. Unreachable routes have the interface `lo`.
fn ipv6(table: &str) -> Option<String> {
    let routes = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let is_default = |fields: &Vec<&str>| matches!(fields[..], [destination, "00", _, "00", .., name] if destination.bytes().all(|c| c == b'0') && name != "lo");
    let metric =
        |fields: &Vec<&str>| fields.get(5).and_then(|metric| u32::from_str_radix(metric, 16).ok()).unwrap_or(u32::MAX);
    Some((*routes.filter(is_default).min_by_key(metric)?.last()?).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_default_route_of_each_family_counts() {
        let table = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
            wlan0\t00000000\t0100A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n\
            eth0\t00000000\t0100A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n\
            eth1\t0000A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        assert_eq!(ipv4(table).as_deref(), Some("eth0"));
        assert_eq!(ipv4(""), None);
        let (zero, gateway) = ("0".repeat(32), "fe800000000000000000000000000001");
        let route = |destination: &str, length: &str, metric: &str, name: &str| {
            format!("{destination} {length} {zero} 00 {gateway} {metric} 00000001 00000000 00450003 {name:>8}\n")
        };
        let table = [
            route(&zero, "00", "00000400", "wlan0"),
            route(&zero, "00", "00000064", "eth0"),
            route("20010db8000000000000000000000000", "20", "00000001", "eth1"),
            route(&zero, "60", "00000001", "eth2"),
            route(&zero, "00", "00000000", "lo"),
        ];
        assert_eq!(ipv6(&table.concat()).as_deref(), Some("eth0"));
        assert_eq!(ipv6(&table[2..].concat()), None);
    }
}
