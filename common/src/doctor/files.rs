//! Checks of the files that a program keeps and reads.

use std::path::{Path, PathBuf};

use super::access::{FileAccess, Identity, Need, UnknownUser, find};
use super::{CheckProblem, Finding, Level, Program};
use crate::Config;
use crate::access_lists::files::Files;
use crate::config::{CONFIG_FILE, FileToRead, KeyLists, PASSWORD_FILE, UnreadableFile};
use crate::storage::process_lock::LockHolder;

/// The running program that answers on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    /// Its process id, in its own namespace.
    pub pid: u32,
    /// Whether it can write its state.
    pub keeps_state: bool,
    /// The lists that it cannot read.
    pub lists_damaged: Vec<String>,
}

/// The facts about the state directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateFacts {
    /// `state_dir`.
    pub dir: PathBuf,
    /// The user as whom the program serves.
    pub user: String,
    /// The user's access to it.
    pub access: FileAccess,
    /// The process that has the program's state file; or why that is not known.
    pub holder: Result<Option<LockHolder>, String>,
}

/// A file or directory of an access list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListFacts {
    /// The key of the config that names it.
    pub key: &'static str,
    /// Where it is.
    pub path: PathBuf,
    /// The program's access to it.
    pub access: FileAccess,
    /// The mistake in its content, with the line; none if it is valid, or was not read.
    pub damage: Option<String>,
}

/// A file without which a program does not start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileFacts {
    /// The key of the config that names it, or `config` for the config itself.
    pub key: &'static str,
    /// Where it is.
    pub path: PathBuf,
    /// The program's access to it.
    pub access: FileAccess,
}

impl FileFacts {
    /// The facts about all files without which `program` does not start; empty for an unknown user.
    #[must_use]
    pub fn of(config: &Config, program: Program, user: Result<&Identity, &UnknownUser>) -> Vec<Self> {
        let Ok(user) = user else { return Vec::new() };
        let files = read_as_user(config, program).into_iter().filter(|file| program.needs(file.needed_by));
        files
            .map(|FileToRead { key, path, .. }| Self { key, access: find(&path, Ok(user), Need::Read), path })
            .collect()
    }
}

/// The files that the program reads as its user. A worker with `worker_user` reads the config and the password's file
/// before it becomes that user.
fn read_as_user(config: &Config, program: Program) -> Vec<FileToRead> {
    let becomes_another = program == Program::Worker && config.worker_user.is_some();
    let mut files = config.files_to_read();
    files.retain(|file| !becomes_another || ![CONFIG_FILE, PASSWORD_FILE].contains(&file.key));
    files
}

/// The files and directories that the program's user, other than the caller, may not read.
#[must_use]
pub fn denied(config: &Config, program: Program, user: &Identity) -> Vec<UnreadableFile> {
    let denied = |file: FileToRead| {
        let need = if file.is_directory() { Need::List } else { Need::Read };
        let FileAccess::Denied(reason) = find(&file.path, Ok(user), need) else { return None };
        let name = &user.name;
        Some(
            config
                .problem_of(&file, &format!("{name}, as whom the {} serves, cannot read it: {reason}", program.word())),
        )
    };
    read_as_user(config, program).into_iter().filter_map(denied).collect()
}

impl StateFacts {
    /// The facts about the state file `name` in `dir`.
    #[must_use]
    pub fn of(dir: &Path, name: &str, user: Result<&Identity, &UnknownUser>) -> Self {
        let file = dir.join(name);
        let mut access = find(dir, user, Need::Write);
        if access == FileAccess::Granted && file.exists() {
            access = find(&file, user, Need::Write);
        }
        let holder = LockHolder::of(&file).map_err(|error| error.to_string());
        let user = user.map_or_else(|unknown| &unknown.name, |user| &user.name);
        Self { dir: dir.to_owned(), user: user.clone(), access, holder }
    }
}

impl ListFacts {
    /// The facts about all lists that the config names.
    #[must_use]
    pub fn of(lists: &KeyLists, user: Result<&Identity, &UnknownUser>) -> Vec<Self> {
        let KeyLists { deny_file, deny_dir, allow, trusted_dir, .. } = lists;
        let allow = allow.as_ref();
        let paths: [(&'static str, Option<&PathBuf>, Need); 5] = [
            ("blacklist_file", deny_file.as_ref(), Need::Read),
            ("allowlist.file", allow.and_then(|allow| allow.file.as_ref()), Need::Read),
            ("key_lists.deny_dir", deny_dir.as_ref(), Need::List),
            ("key_lists.allow_dir", allow.and_then(|allow| allow.dir.as_ref()), Need::List),
            ("key_lists.trusted_dir", trusted_dir.as_ref(), Need::List),
        ];
        let mut files = Files::new(lists);
        files.read(true);
        let facts = paths.into_iter().filter_map(|(key, path, need)| {
            let path = path?.clone();
            let access = find(&path, user, need);
            let damage = files.damages().find(|(list, _)| *list == key && access == FileAccess::Granted);
            Some(Self { key, damage: damage.map(|(_, damage)| damage.to_owned()), access, path })
        });
        facts.collect()
    }
}

/// Whether the state can be written, and which process has it.
#[must_use]
pub fn state(program: Program, facts: &StateFacts, running: Option<&Running>) -> Vec<Finding> {
    let StateFacts { dir, user, access, .. } = facts;
    let (dir, word) = (dir.display(), program.word());
    let make = format!("`install -d -m 700 -o {user} {dir}` and `chown -R {user} {dir}`, or name another state_dir");
    let is_kept = running.is_some_and(|running| running.keeps_state);
    let kept = match access {
        _ if is_kept => Finding::ok("state", format!("the running {word} writes to {dir}")),
        FileAccess::Granted => Finding::ok("state", format!("{user} may write to {dir}")),
        FileAccess::Creatable => Finding::ok("state", format!("{dir} is not there yet, and {user} may make it")),
        FileAccess::OnlyFor(other) => Finding::warn(
            "state",
            format!("{dir} is writable for {other} and not for {user}"),
            format!("start the {word} as {other} ({}), or {make}", program.user()),
        ),
        FileAccess::Denied(reason) => Finding::fail("state", format!("{user} cannot write to {dir}: {reason}"), make),
        FileAccess::OnlyWhileRunning => unchecked("state", facts.dir.as_path()),
        FileAccess::Unknown(reason) => unknown_access("state", facts.dir.as_path(), reason),
    };
    [kept].into_iter().chain(holder(program, facts, running)).collect()
}

/// Whether the running program is the one that has the state file.
fn holder(program: Program, facts: &StateFacts, running: Option<&Running>) -> Option<Finding> {
    let (word, listen) = (program.word(), program.listen());
    let holder = match &facts.holder {
        Ok(holder) => holder.as_ref()?,
        Err(error) => {
            let found = format!("the process that has the state file cannot be determined: {error}");
            return Some(Finding::warn("state", found, "run the doctor as root"));
        }
    };
    Some(match running {
        Some(Running { pid, .. }) if holder.pid.is_none_or(|holder| holder == *pid) => {
            Finding::ok("state", format!("the running {word} has its state file"))
        }
        Some(Running { pid, .. }) => Finding::fail(
            "state",
            format!("{holder} has the state file, and {word} {pid} answers on {listen}: two {word}s on one machine"),
            "end one of them",
        ),
        None => Finding::warn(
            "state",
            format!("{holder} has the state file, and no {word} answers on {listen}"),
            format!("if it has not just been started, look at its log; a second {word} does not start"),
        ),
    })
}

/// Whether the lists can be read.
#[must_use]
pub fn lists(program: Program, user: &str, lists: &[ListFacts], running: Option<&Running>) -> Vec<Finding> {
    let is_damaged = |running: &Running, key: &str| running.lists_damaged.iter().any(|damaged| damaged == key);
    let check = |list: &ListFacts| match running {
        Some(running) => read_list(program, list, is_damaged(running, list.key)),
        None => unread_list(program, list, user),
    };
    lists.iter().map(check).collect()
}

/// The state of a list in the running program.
fn read_list(program: Program, list: &ListFacts, is_damaged: bool) -> Finding {
    let ListFacts { key, path, damage, .. } = list;
    let (path, word) = (path.display(), program.word());
    if let Some(damage) = damage {
        return Finding::fail(
            key,
            format!("{path}: {damage}: what the running {word} last read of it counts"),
            "correct it: it is read again by itself",
        );
    }
    let damaged = is_damaged.then(|| CheckProblem {
        found: format!("the running {word} cannot read {path}, or it is damaged: what it last read counts"),
        advice: "its log has the reason, with the line".into(),
    });
    Finding::judge(key, Level::Fail, format!("the running {word} has read {path}"), damaged)
}

/// Whether the files can be read that the program needs to start.
#[must_use]
pub fn needed(program: Program, user: &str, files: &[FileFacts]) -> Vec<Finding> {
    files.iter().map(|FileFacts { key, path, access }| readable(program, key, path, access, user)).collect()
}

fn unread_list(program: Program, ListFacts { key, path, access, damage }: &ListFacts, user: &str) -> Finding {
    match damage {
        Some(damage) => Finding::fail(key, format!("{}: {damage}", path.display()), "correct it"),
        None => readable(program, key, path, access, user),
    }
}

/// Whether the program's user may read the file of this `key` of the config.
fn readable(program: Program, key: &str, file: &Path, access: &FileAccess, user: &str) -> Finding {
    let (path, advice) = (file.display(), format!("let {user} read it (chmod, chown)"));
    match access {
        FileAccess::Granted => Finding::ok(key, format!("{user} may read {path}")),
        FileAccess::Creatable => {
            Finding::fail(key, format!("{path} is missing"), format!("write it, or take {key} out of the config"))
        }
        FileAccess::OnlyFor(other) => {
            let advice = format!("start the {} as {other} ({}), or {advice}", program.word(), program.user());
            Finding::warn(key, format!("{path} is readable for {other} and not for {user}"), advice)
        }
        FileAccess::Denied(reason) => Finding::fail(key, format!("{user} cannot read {path}: {reason}"), advice),
        FileAccess::OnlyWhileRunning => unchecked(key, file),
        FileAccess::Unknown(reason) => unknown_access(key, file, reason),
    }
}

fn unchecked(key: &str, file: &Path) -> Finding {
    Finding::ok(key, format!("{} is there only while the unit runs: it is not checked", file.display()))
}

fn unknown_access(key: &str, file: &Path, reason: &str) -> Finding {
    Finding::warn(key, format!("{} cannot be looked at: {reason}", file.display()), "run the doctor as root")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::config::NeededBy;

    /// A config that names a file that only its owner may read, and a list.
    fn config(dir: &Path, more: &str) -> Config {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["ca.pem", "secret", "list"] {
            fs::write(dir.join(name), "x\n").unwrap();
            fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o600)).unwrap();
        }
        let dir = dir.display();
        let yaml = format!(
            "domains: [x_a]\ndomain_prefixes: [x_]\nblacklist_file: {dir}/list\nmqtt:\n  broker_url: h\n  tls: true\n  \
             ca_file: {dir}/ca.pem\n  username: u\n  password_file: {dir}/secret\n{more}"
        );
        Config::parse("/etc/wgkex.yaml", &yaml, "gw1").unwrap()
    }

    fn stranger() -> Identity {
        Identity::in_status("Uid:\t4711\nGid:\t4711\nGroups:\t\n").unwrap()
    }

    #[test]
    fn each_file_that_the_programs_user_may_not_read_is_named_with_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path(), "");
        let facts = FileFacts::of(&config, Program::Broker, Ok(&stranger()));
        let keys: Vec<_> = facts.iter().map(|file| file.key).collect();
        assert_eq!(keys, [CONFIG_FILE, PASSWORD_FILE, "mqtt.ca_file"]);
        let findings = needed(Program::Broker, "4711", &facts[1..]);
        for (finding, file) in findings.iter().zip(["secret", "ca.pem"]) {
            assert_eq!(finding.level, Level::Fail, "{finding:?}");
            let begin = format!("4711 cannot read {}: ", dir.path().join(file).display());
            assert!(finding.found.starts_with(&begin), "{finding:?}");
        }
        let denied = denied(&config, Program::Broker, &stranger());
        let found: Vec<_> = denied.iter().map(|file| (file.needed_by, file.problem.to_string())).collect();
        let text = |line: usize, key: &str, file: &str| {
            let path = dir.path().join(file);
            format!(
                "/etc/wgkex.yaml:{line}: {key}: {}: 4711, as whom the broker serves, cannot read it: ",
                path.display()
            )
        };
        let expected =
            [(NeededBy::Both, text(7, "mqtt.ca_file", "ca.pem")), (NeededBy::None, text(3, "blacklist_file", "list"))];
        for (needed_by, begin) in expected {
            let is_it = |(found, text): &&(NeededBy, String)| *found == needed_by && text.starts_with(&begin);
            assert!(found.iter().any(|found| is_it(&found)), "{begin} is not in {found:?}");
        }
    }

    #[test]
    fn a_worker_that_becomes_another_user_reads_its_config_and_password_before() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path(), "worker_user: nobody\n");
        let keys = |program| {
            let facts = FileFacts::of(&config, program, Ok(&stranger()));
            facts.into_iter().map(|file| file.key).collect::<Vec<_>>()
        };
        assert_eq!(keys(Program::Worker), ["mqtt.ca_file"]);
        assert_eq!(keys(Program::Broker), [CONFIG_FILE, PASSWORD_FILE, "mqtt.ca_file"]);
    }
}
