//! The user as whom a program serves: by its process, by the config, or by its unit.

use std::fs;
use std::path::Path;

use super::Program;
use super::access::{Identity, UnknownUser};
use super::config_files::{assignments, files};
use nix::unistd::Uid;

/// The directories of units, the most important first.
const UNITS: [&str; 4] = ["etc/systemd/system", "run/systemd/system", "usr/lib/systemd/system", "lib/systemd/system"];

/// The sources of a program's user.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sources<'a> {
    /// The user on the command line.
    pub named: Option<&'a str>,
    /// The running process.
    pub pid: Option<u32>,
    /// The user in the config: the program becomes this user, without further groups.
    pub config: Option<&'a str>,
}

/// The user on the command line; else that of the process; else that in the config; else, if the caller is root, that
/// of the unit; else the caller.
pub fn find(program: Program, sources: Sources<'_>) -> Result<Identity, UnknownUser> {
    find_in(Path::new("/"), program, sources)
}

fn find_in(
    root: &Path,
    program: Program,
    Sources { named, pid, config }: Sources<'_>,
) -> Result<Identity, UnknownUser> {
    if let Some(name) = named {
        return Identity::of_account(name);
    }
    if let Some(process) = pid.and_then(Identity::of_process) {
        return Ok(process);
    }
    match UnitUser::of(root, &format!("wgkex-{}.service", program.word())) {
        Some(unit) if config.is_none() && Uid::effective().is_root() => unit.identity(),
        Some(_) | None => Identity::named(config),
    }
}

/// The user and the groups of a unit.
#[derive(Debug, PartialEq, Eq)]
struct UnitUser {
    name: String,
    group: Option<String>,
    supplementary: Vec<String>,
}

impl UnitUser {
    /// The user and groups of a unit that names a user, with its drop-ins.
    fn of(root: &Path, name: &str) -> Option<Self> {
        let texts = unit_texts(root, name)?;
        Some(Self { name: last(&texts, "User")?, group: last(&texts, "Group"), supplementary: groups(&texts) })
    }

    fn identity(&self) -> Result<Identity, UnknownUser> {
        Identity::of_unit(&self.name, self.group.as_deref(), &self.supplementary)
    }
}

/// The texts of a unit and its drop-ins.
fn unit_texts(root: &Path, name: &str) -> Option<Vec<String>> {
    let dirs = UNITS.map(|dir| root.join(dir));
    let unit = dirs.iter().find_map(|dir| fs::read_to_string(dir.join(name)).ok())?;
    let added = files(dirs.iter().rev().map(|dir| dir.join(format!("{name}.d"))), "conf");
    let texts = added.iter().filter_map(|path| fs::read_to_string(path).ok());
    Some([unit].into_iter().chain(texts).collect())
}

/// The values of a key, such as `User`, in their order.
fn values<'a>(texts: &'a [String], key: &'a str) -> impl Iterator<Item = &'a str> {
    texts.iter().flat_map(|text| assignments(text)).filter(move |one| one.key == key).map(|one| one.value)
}

/// The last value of a key; an empty value resets it.
fn last(texts: &[String], key: &str) -> Option<String> {
    values(texts, key).last().filter(|value| !value.is_empty()).map(str::to_owned)
}

/// All `SupplementaryGroups=`; an empty value resets them.
fn groups(texts: &[String]) -> Vec<String> {
    let mut groups = Vec::new();
    for value in values(texts, "SupplementaryGroups") {
        if value.is_empty() {
            groups.clear();
        }
        groups.extend(value.split_whitespace().map(str::to_owned));
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, file: &str, text: &str) {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn the_last_user_and_group_count_that_a_unit_or_an_addition_names() {
        let root = tempfile::tempdir().unwrap();
        let unit = || UnitUser::of(root.path(), "wgkex-broker.service");
        let user = || unit().map(|unit| unit.name);
        let write = |file: &str, text: &str| write(root.path(), file, text);
        assert_eq!(user(), None);
        write("usr/lib/systemd/system/wgkex-broker.service", "[Service]\nUser=wgkex\nGroup=other\n");
        assert_eq!(user().as_deref(), Some("wgkex"));
        write("etc/systemd/system/wgkex-broker.service.d/20-user.conf", "[Service]\n User=broker\n");
        write("run/systemd/system/wgkex-broker.service.d/10-user.conf", "[Service]\nUser=early\n");
        write("etc/systemd/system/wgkex-broker.service.d/30-user.txt", "User=ignored\n");
        assert_eq!(user().as_deref(), Some("broker"));
        write("etc/systemd/system/wgkex-broker.service.d/40.conf", "[Service]\nSupplementaryGroups=ssl-cert a\n");
        write(
            "etc/systemd/system/wgkex-broker.service.d/50.conf",
            "[Service]\nSupplementaryGroups=\nSupplementaryGroups=b\n",
        );
        let expected = UnitUser { name: "broker".into(), group: Some("other".into()), supplementary: vec!["b".into()] };
        assert_eq!(unit(), Some(expected));
        write("etc/systemd/system/wgkex-broker.service.d/90.conf", "[Service]\nUser=\n");
        assert_eq!(user(), None);
    }

    #[test]
    fn each_program_has_its_unit_and_what_is_nearer_to_it_counts_more() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "usr/lib/systemd/system/wgkex-worker.service", "[Service]\nUser=no_such_unit_user\n");
        let name = |program, sources| match find_in(root.path(), program, sources) {
            Ok(identity) => identity.name,
            Err(unknown) => unknown.name,
        };
        let own = Identity::named(None).unwrap().name;
        let by_unit = if Uid::effective().is_root() { "no_such_unit_user" } else { &own };
        let sources = Sources::default();
        assert_eq!(name(Program::Worker, sources), by_unit);
        assert_eq!(name(Program::Broker, sources), own);
        let sources = Sources { config: Some("no_such_config_user"), ..sources };
        assert_eq!(name(Program::Worker, sources), "no_such_config_user");
        let sources = Sources { pid: Some(std::process::id()), ..sources };
        assert_eq!(name(Program::Worker, sources), own);
        assert_eq!(name(Program::Worker, Sources { named: Some("no_such_user"), ..sources }), "no_such_user");
    }
}
