//! `dry-run`: reads the kernel's tables, the lists and a copy of the state file, and prints what a worker would change.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use clap::Args;
use serde_json::json;
use tokio::runtime::Builder;
use wgkex_common::access_lists::Admission;
use wgkex_common::access_lists::service::admission_on_disk;
use wgkex_common::drain;
use wgkex_common::storage::key_store::{self, Clocks, Keys};
use wgkex_common::storage::process_lock::LockHolder;
use wgkex_common::time_text::unix;
use wgkex_common::wire::drain::Deadline;
use wgkex_common::{Config, Domain, KeyId, PublicKey, Reserved};
use wgkex_kernel::netlink::Netlink;
use wgkex_kernel::{Device, Kernel as _, Peer};

use super::{print, print_error};
use crate::dry_run::{Command, PreviewParts, commands, preview, script};
use crate::leases::{self, ServerPreview};
use crate::peers::Policy;
use crate::profiles::mesh::{self, Mesh};
use crate::profiles::{Ownership, Profile as _};

/// How long a running worker may take to write its changes to the state file: a second, and more where the machine is
/// busy.
const STATE_PATIENCE: Duration = Duration::from_secs(5);
/// The pause between two reads of its state file.
const STATE_PAUSE: Duration = Duration::from_millis(100);

/// The command `dry-run`.
#[derive(Debug, Clone, Args)]
pub struct DryRun {
    /// Print them as JSON
    #[arg(long)]
    json: bool,
}

/// The changes that the worker would make at one domain or server; or why they are not known.
type DryRunOutcome = Result<Vec<Command>, String>;

/// The tables of every domain, or why they cannot be read.
type DomainTables = BTreeMap<Domain, Result<Device, String>>;

/// The state on disk that decides about the changes of every domain.
struct RememberedState {
    remembered: Keys,
    admission: Arc<Admission>,
    deadline: Option<Deadline>,
    reserved: Reserved,
}

impl DryRun {
    /// Prints the commands, and returns how the process ends: 0, or 1 if a domain could not be read.
    #[must_use]
    pub fn run(&self, file: Option<&Path>) -> ExitCode {
        let outcomes = match outcomes(file) {
            Ok(outcomes) => outcomes,
            Err(error) => {
                print_error(&error);
                return ExitCode::FAILURE;
            }
        };
        if print(&self.text(&outcomes)).is_err() || outcomes.values().any(Result::is_err) {
            return ExitCode::FAILURE;
        }
        ExitCode::SUCCESS
    }

    fn text(&self, outcomes: &BTreeMap<String, DryRunOutcome>) -> String {
        if self.json {
            let domain = |outcome: &DryRunOutcome| match outcome {
                Ok(commands) => json!({ "changes": commands }),
                Err(error) => json!({ "error": error }),
            };
            let domains: BTreeMap<_, _> = outcomes.iter().map(|(name, outcome)| (name, domain(outcome))).collect();
            return format!("{:#}\n", json!(domains));
        }
        let domain = |(name, outcome): (&String, &DryRunOutcome)| match outcome {
            Ok(commands) => script(name, commands),
            Err(error) => format!("# {name}: {error}\n"),
        };
        outcomes.iter().map(domain).collect()
    }
}

fn outcomes(file: Option<&Path>) -> anyhow::Result<BTreeMap<String, DryRunOutcome>> {
    let config = Config::load(file)?;
    let runtime = Builder::new_current_thread().enable_all().build().context("the runtime does not start")?;
    let tables = runtime.block_on(tables(&config));
    let servers = runtime.block_on(servers(&config));
    // A hanging call of the kernel must not keep the process from ending.
    runtime.shutdown_background();
    let tables = tables?;
    let remembered = remembered(&config, &tables)?;
    let admission = Arc::new(admission_on_disk(&config).context("the records of the access lists")?);
    let reserved = Reserved::new(config.protected_keys.clone(), config.domains.clone());
    let drain = drain::read(&drain::worker_file(&config.state_dir)).context("the drain")?;
    let deadline = drain.and_then(|drain| drain.at(unix(SystemTime::now())).passed_deadline());
    let known = RememberedState { remembered, admission, deadline, reserved };
    let outcome = |(domain, device): (Domain, Result<Device, String>)| {
        (domain.to_string(), device.map(|device| outcome(&config, &domain, &device, &known)))
    };
    let servers = servers?.into_iter().map(|(name, outcome)| (format!("server {name}"), outcome));
    Ok(tables.into_iter().map(outcome).chain(servers).collect())
}

/// The changes for each server of the registry, and the hub.
async fn servers(config: &Config) -> anyhow::Result<BTreeMap<String, DryRunOutcome>> {
    if config.servers.is_empty() && config.hub.is_none() {
        return Ok(BTreeMap::new());
    }
    let mut kernel = Netlink::open().context("netlink")?;
    let previews = leases::preview(config, &mut kernel).await.context("the leases")?;
    let outcome = |preview: ServerPreview| commands(&preview.interface, &preview.device, &preview.planned);
    Ok(previews.into_iter().map(|(name, preview)| (name, preview.map(outcome))).collect())
}

async fn tables(config: &Config) -> anyhow::Result<DomainTables> {
    let mut kernel = Netlink::open().context("netlink")?;
    let mut tables = DomainTables::new();
    for domain in &config.domains {
        let device = kernel.read(&mesh::interface(domain)).await.map_err(|error| error.to_string());
        tables.insert(domain.clone(), device);
    }
    Ok(tables)
}

/// The keys in the state file. A running worker writes it up to a second after the kernel: waits until it has the peers
/// that are in the tables, as they would be taken for unknown peers otherwise.
fn remembered(config: &Config, tables: &DomainTables) -> anyhow::Result<Keys> {
    let (file, until) = (key_store::WORKER_FILE.path(&config.state_dir), Instant::now() + STATE_PATIENCE);
    loop {
        let now = Clocks::read();
        let keys = key_store::read_copy(&config.state_dir, key_store::WORKER_FILE, &config.domains, now)
            .context("the state file")?;
        let is_running = || matches!(LockHolder::of(&file), Ok(Some(_)));
        if knows_new_peers(&keys, tables) || Instant::now() >= until || !is_running() {
            return Ok(keys);
        }
        sleep(STATE_PAUSE);
    }
}

/// Whether `keys` has each peer in these tables that a worker made and that had no handshake yet.
fn knows_new_peers(keys: &Keys, tables: &DomainTables) -> bool {
    let is_known = |domain: &Domain, key: &PublicKey, peer: &Peer| {
        let is_ours = || Mesh.desired(key).is_some_and(|desired| desired.ownership(peer) == Ownership::Ours);
        let id = KeyId { domain: domain.clone(), key: *key };
        peer.last_handshake.is_some() || keys.contains_key(&id) || !is_ours()
    };
    let read = tables.iter().filter_map(|(domain, device)| Some((domain, device.as_ref().ok()?)));
    read.flat_map(|(domain, device)| device.peers.iter().map(move |(key, peer)| (domain, key, peer)))
        .all(|(domain, key, peer)| is_known(domain, key, peer))
}

fn outcome(config: &Config, domain: &Domain, device: &Device, known: &RememberedState) -> Vec<Command> {
    let interface = mesh::interface(domain);
    let of_domain = known.remembered.iter().filter(|(id, _)| id.domain == *domain);
    let parts = PreviewParts {
        domain,
        profile: Arc::new(Mesh),
        policy: Policy::from(config),
        remembered: of_domain.map(|(id, record)| (id.key, *record)).collect::<BTreeMap<PublicKey, _>>(),
        admission: known.admission.clone(),
        deadline: known.deadline,
        reserved: &known.reserved,
    };
    commands(&interface, device, &preview(parts, device, Clocks::read()))
}
