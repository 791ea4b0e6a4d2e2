//! Other programs that may manage the interfaces, found by their configs and by the running processes.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use crate::doctor::facts::{Managers, NetworkFile, WgQuick};
use wgkex_common::doctor::config_files::{self, Assignment, assignments};
use wgkex_common::doctor::sockets;

/// The directories of configs, the most important last.
const PLACES: [&str; 3] = ["usr/lib", "run", "etc"];

/// The values of systemd that mean "yes".
const YES: [&str; 4] = ["yes", "true", "on", "1"];

/// An interface that the worker takes for its own, by its name.
#[derive(Debug, Clone)]
pub(super) enum ManagedInterface {
    Wireguard(String),
    Vxlan(String),
}

/// A machine's files and processes.
pub(super) struct Machine {
    root: PathBuf,
    /// The names of the processes in this network namespace.
    processes: BTreeSet<String>,
}

impl ManagedInterface {
    fn name(&self) -> &str {
        match self {
            Self::Wireguard(name) | Self::Vxlan(name) => name,
        }
    }

    /// The interface's kind in the terms of systemd.network(5).
    fn kind(&self) -> &'static str {
        match self {
            Self::Wireguard(_) => "wireguard",
            Self::Vxlan(_) => "vxlan",
        }
    }
}

impl Machine {
    pub(super) fn this() -> Self {
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        let own = namespace("self");
        let processes = sockets::processes().into_iter().filter(|pid| namespace(&pid.to_string()) == own);
        Self { root: "/".into(), processes: processes.map(sockets::name).collect() }
    }

    /// The programs that may manage `interfaces`.
    pub(super) fn managers(&self, interfaces: &[ManagedInterface]) -> Managers {
        let file = |interface: &ManagedInterface| Some((interface.name().to_owned(), self.networkd_file(interface)?));
        let networkd_files = interfaces.iter().filter_map(file);
        let names = interfaces.iter().map(ManagedInterface::name);
        let unmanaged = self.unmanaged();
        let is_managed = |name: &&str| !unmanaged.iter().any(|pattern| matches(pattern, name));
        Managers {
            // The kernel cuts process names after 15 characters.
            networkd_runs: self.processes.contains("systemd-network"),
            networkd_keeps_foreign: self.keeps_foreign(),
            networkd_files: networkd_files.collect(),
            wg_quick: interfaces.iter().filter_map(|interface| self.wg_quick(interface)).collect(),
            network_manager_runs: self.processes.contains("NetworkManager"),
            network_manager_manages: names.filter(is_managed).map(str::to_owned).collect(),
        }
    }

    fn keeps_foreign(&self) -> bool {
        let mut files = vec![self.root.join("etc/systemd/networkd.conf")];
        files.extend(self.files("systemd/networkd.conf.d", "conf"));
        let (mut routes, mut rules) = (false, false);
        for text in files.iter().filter_map(|file| fs::read_to_string(file).ok()) {
            for Assignment { key, value, .. } in assignments(&text) {
                let is_off = ["no", "false", "off", "0"].contains(&value.to_ascii_lowercase().as_str());
                match key {
                    "ManageForeignRoutes" => routes = is_off,
                    "ManageForeignRoutingPolicyRules" => rules = is_off,
                    _ => {}
                }
            }
        }
        routes && rules
    }

    /// The first .network file that matches the interface, unless that makes it unmanaged.
    fn networkd_file(&self, interface: &ManagedInterface) -> Option<NetworkFile> {
        let files = self.files("systemd/network", "network").into_iter();
        let mut texts = files.filter_map(|file| Some((fs::read_to_string(&file).ok()?, file)));
        let (text, path) = texts.find(|(text, _)| is_match(text, interface))?;
        let last = |section: &str, key: &str| {
            assignments(&text).filter(|one| (one.section, one.key) == (section, key)).last().map(|one| one.value)
        };
        let is_unmanaged = last("Link", "Unmanaged").is_some_and(|value| YES.contains(&value));
        // The other values are about routes of DHCP (systemd.network(5)).
        let keeps = |value: &str| value == "static" || YES.contains(&value);
        let keeps_configuration = last("Network", "KeepConfiguration").is_some_and(keeps);
        (!is_unmanaged).then_some(NetworkFile { path, keeps_configuration })
    }

    fn wg_quick(&self, interface: &ManagedInterface) -> Option<WgQuick> {
        let ManagedInterface::Wireguard(interface) = interface else { return None };
        let units = ["etc", "run"].map(|place| {
            self.root.join(format!("{place}/systemd/system/multi-user.target.wants/wg-quick@{interface}.service"))
        });
        let config = self.root.join(format!("etc/wireguard/{interface}.conf"));
        let unit = units.into_iter().find(|unit| unit.symlink_metadata().is_ok());
        let is_enabled = unit.is_some();
        let file = unit.or_else(|| config.exists().then_some(config))?;
        Some(WgQuick { interface: interface.clone(), file, is_enabled })
    }

    /// The interfaces that `NetworkManager` is configured to leave alone, as patterns of names.
    fn unmanaged(&self) -> Vec<String> {
        let mut files = vec![self.root.join("etc/NetworkManager/NetworkManager.conf")];
        files.extend(self.files("NetworkManager/conf.d", "conf"));
        let texts: Vec<_> = files.iter().filter_map(|file| fs::read_to_string(file).ok()).collect();
        let values =
            texts.iter().flat_map(|text| assignments(text)).filter(|one| one.key.starts_with("unmanaged-devices"));
        let specs = values.flat_map(|one| one.value.split([';', ',']));
        specs
            .filter_map(|spec| Some(spec.trim().strip_prefix("interface-name:")?.trim_start_matches('=').to_owned()))
            .collect()
    }

    /// The files of this kind, by name; of several with one name that in the most important place.
    fn files(&self, dir: &str, extension: &str) -> Vec<PathBuf> {
        config_files::files(PLACES.map(|place| self.root.join(place).join(dir)), extension)
    }
}

/// Whether a .network file matches this interface: its section Match has only names and kinds, and all of them match.
fn is_match(text: &str, interface: &ManagedInterface) -> bool {
    let mut conditions = assignments(text).filter(|one| one.section == "Match" && !one.value.is_empty()).peekable();
    conditions.peek().is_some()
        && conditions.all(|Assignment { key, value, .. }| match key {
            "Name" | "OriginalName" => is_one(value, interface.name()),
            "Kind" | "Type" => is_one(value, interface.kind()),
            _ => false,
        })
}

/// Whether `text` is one of these patterns, or with an exclamation mark none of them.
fn is_one(patterns: &str, text: &str) -> bool {
    let (patterns, inverted) = match patterns.strip_prefix('!') {
        Some(patterns) => (patterns, true),
        None => (patterns, false),
    };
    patterns.split_whitespace().any(|pattern| matches(pattern, text)) != inverted
}

/// Whether a pattern with `*` and `?` is for this text.
fn matches(pattern: &str, text: &str) -> bool {
    let (mut pattern, mut rest) = (pattern.chars(), text.chars());
    match (pattern.next(), rest.next()) {
        (None, None) => true,
        (Some('*'), _) => {
            (0..=text.len()).any(|from| text.get(from..).is_some_and(|text| matches(pattern.as_str(), text)))
        }
        (Some('?'), Some(_)) => matches(pattern.as_str(), rest.as_str()),
        (Some(wanted), Some(found)) => wanted == found && matches(pattern.as_str(), rest.as_str()),
        (Some(_), None) | (None, Some(_)) => false,
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn machine(processes: &[&str], files: &[(&str, &str)]) -> (TempDir, Managers) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let processes = processes.iter().map(ToString::to_string).collect();
        let machine = Machine { root: dir.path().into(), processes };
        let managers = machine
            .managers(&[ManagedInterface::Wireguard("wg-welt".into()), ManagedInterface::Vxlan("vx-welt".into())]);
        (dir, managers)
    }

    #[test]
    fn the_first_network_file_that_matches_counts() {
        let file = |dir: &TempDir, name: &str| dir.path().join(name);
        for (text, interfaces) in [
            ("[Match]\nName=wg-*\n", vec!["wg-welt"]),
            ("[Match]\nName = en* vx-welt\n", vec!["vx-welt"]),
            ("[Match]\nName=!en*\n", vec!["vx-welt", "wg-welt"]),
            ("[Match]\nName=*\nKind=wireguard\n", vec!["wg-welt"]),
            ("[Match]\nName=*\nMACAddress=02:00:00:00:00:01\n", vec![]),
            ("[Match]\nType=ether\n", vec![]),
            ("[Match]\nName=*\n[Link]\nUnmanaged=yes\n", vec![]),
            ("# [Match]\n#Name=*\n[Network]\nDHCP=yes\n", vec![]),
        ] {
            let (dir, managers) = machine(&[], &[("etc/systemd/network/20-a.network", text)]);
            let path = file(&dir, "etc/systemd/network/20-a.network");
            let found: Vec<_> = managers.networkd_files.iter().map(|(name, file)| (&**name, &file.path)).collect();
            assert_eq!(found, interfaces.iter().map(|name| (*name, &path)).collect::<Vec<_>>(), "{text}");
        }
        let (dir, managers) = machine(
            &["systemd-network"],
            &[
                ("usr/lib/systemd/network/10-a.network", "[Match]\nName=wg-*"),
                ("etc/systemd/network/10-a.network", "[Match]\nName=other"),
                ("run/systemd/network/30-b.network", "[Match]\nName=wg-*"),
            ],
        );
        assert!(managers.networkd_runs && !managers.network_manager_runs);
        assert_eq!(managers.networkd_files["wg-welt"].path, file(&dir, "run/systemd/network/30-b.network"));
    }

    #[test]
    fn a_network_file_may_keep_routes_of_others() {
        for (text, keeps) in [
            ("[Network]\nKeepConfiguration=yes\n", true),
            ("[Network]\nKeepConfiguration=static\n", true),
            ("[Network]\nKeepConfiguration=dhcp\n", false),
            ("[Network]\nKeepConfiguration=yes\nKeepConfiguration=no\n", false),
            ("[Link]\nKeepConfiguration=yes\n", false),
        ] {
            let text = format!("[Match]\nName=wg-*\n{text}");
            let (_dir, managers) = machine(&[], &[("etc/systemd/network/20-a.network", &text)]);
            assert_eq!(managers.networkd_files["wg-welt"].keeps_configuration, keeps, "{text}");
        }
    }

    /// A server of the registry, whose interface has any name.
    #[test]
    fn an_interface_is_known_by_its_kind_whatever_its_name() {
        let (dir, _) = machine(
            &[],
            &[("etc/wireguard/s1.conf", ""), ("etc/systemd/network/20-a.network", "[Match]\nName=*\nKind=wireguard\n")],
        );
        let machine = Machine { root: dir.path().into(), processes: BTreeSet::new() };
        let managers = machine.managers(&[ManagedInterface::Wireguard("s1".into())]);
        assert_eq!((managers.wg_quick[0].interface.as_str(), managers.networkd_files.len()), ("s1", 1));
    }

    #[test]
    fn networkd_keeps_what_others_made_only_if_two_settings_require_it() {
        let both = "[Network]\nManageForeignRoutes=no\nManageForeignRoutingPolicyRules=false\n";
        for (conf, drop_in, keeps) in [
            ("", "", false),
            (both, "", true),
            ("[Network]\nManageForeignRoutes=no\n", "", false),
            ("", both, true),
            (both, "[Network]\nManageForeignRoutes=yes\n", false),
            ("[Network]\n#ManageForeignRoutes=no\n#ManageForeignRoutingPolicyRules=no", "", false),
        ] {
            let (_dir, managers) =
                machine(&[], &[("etc/systemd/networkd.conf", conf), ("etc/systemd/networkd.conf.d/a.conf", drop_in)]);
            assert_eq!(managers.networkd_keeps_foreign, keeps, "{conf} {drop_in}");
        }
    }

    #[test]
    fn wg_quick_and_network_manager_are_found() {
        let (_dir, managers) = machine(&["NetworkManager"], &[("etc/wireguard/wg-welt.conf", "")]);
        assert!(!managers.wg_quick[0].is_enabled && managers.network_manager_runs);
        assert_eq!(managers.network_manager_manages.len(), 2);
        let (_dir, managers) = machine(
            &[],
            &[
                ("run/systemd/system/multi-user.target.wants/wg-quick@wg-welt.service", ""),
                ("etc/NetworkManager/conf.d/a.conf", "[keyfile]\nunmanaged-devices=mac:1;interface-name:wg-*"),
            ],
        );
        assert!(managers.wg_quick[0].is_enabled);
        assert_eq!(managers.network_manager_manages, ["vx-welt".to_owned()].into());
    }
}
