//! `dry-run`: reads the kernel's tables, the lists and a copy of the state file, and prints what a worker would change.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Context as _;
use clap::Args;
use serde_json::json;
use tokio::runtime::Builder;
use wgkex_common::access_lists::service::admission_on_disk;
use wgkex_common::access_lists::{Admission, unix};
use wgkex_common::drain::{self, Deadline};
use wgkex_common::storage::key_store::{self, Clocks, Keys};
use wgkex_common::{Config, Domain, PublicKey, Reserved};
use wgkex_kernel::netlink::Netlink;
use wgkex_kernel::{Interface, Kernel};

use super::{complain, print};
use crate::dry_run::{Command, PreviewParts, commands, preview, script};
use crate::profiles::mesh::Mesh;

/// The command `dry-run`.
#[derive(Debug, Clone, Args)]
pub struct DryRun {
    /// Print them as JSON
    #[arg(long)]
    json: bool,
}

/// What the worker would do at one domain; or why that is not known.
type Outcome = Result<Vec<Command>, String>;

/// What the changes of every domain depend on.
struct Known {
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
                complain(&error);
                return ExitCode::FAILURE;
            }
        };
        if print(&self.text(&outcomes)).is_err() || outcomes.values().any(Result::is_err) {
            return ExitCode::FAILURE;
        }
        ExitCode::SUCCESS
    }

    fn text(&self, outcomes: &BTreeMap<String, Outcome>) -> String {
        if self.json {
            let domain = |outcome: &Outcome| match outcome {
                Ok(commands) => json!({ "changes": commands }),
                Err(error) => json!({ "error": error }),
            };
            let domains: BTreeMap<_, _> = outcomes.iter().map(|(name, outcome)| (name, domain(outcome))).collect();
            return format!("{:#}\n", json!(domains));
        }
        let domain = |(name, outcome): (&String, &Outcome)| match outcome {
            Ok(commands) => script(name, commands),
            Err(error) => format!("# {name}: {error}\n"),
        };
        outcomes.iter().map(domain).collect()
    }
}

fn outcomes(file: Option<&Path>) -> anyhow::Result<BTreeMap<String, Outcome>> {
    let config = Config::load(file)?;
    let now = Clocks::read();
    let remembered =
        key_store::read_copy(&config.state_dir, "worker", &config.domains, now).context("the state file")?;
    let admission = Arc::new(admission_on_disk(&config).context("the records of the access lists")?);
    let reserved = Reserved::new(config.protected_keys.clone(), config.domains.clone());
    let drain = drain::read(&drain::worker_file(&config.state_dir)).context("the drain")?;
    let deadline = drain.and_then(|drain| drain.at(unix(SystemTime::now())).passed_deadline());
    let known = Known { remembered, admission, deadline, reserved };
    let runtime = Builder::new_current_thread().enable_all().build().context("the runtime does not start")?;
    let outcomes = runtime.block_on(async {
        let mut kernel = Netlink::open().context("netlink")?;
        let mut outcomes = BTreeMap::new();
        for domain in &config.domains {
            outcomes.insert(domain.to_string(), outcome(&config, domain, &mut kernel, &known).await);
        }
        Ok(outcomes)
    });
    // A kernel that does not answer must not keep the process from its end.
    runtime.shutdown_background();
    outcomes
}

async fn outcome(config: &Config, domain: &Domain, kernel: &mut Netlink, known: &Known) -> Outcome {
    let interface = Interface::from(domain);
    let device = kernel.read(&interface).await.map_err(|error| error.to_string())?;
    let of_domain = known.remembered.iter().filter(|(id, _)| id.domain == *domain);
    let parts = PreviewParts {
        domain,
        profile: Arc::new(Mesh),
        policy: crate::policy(config),
        remembered: of_domain.map(|(id, record)| (id.key, *record)).collect::<BTreeMap<PublicKey, _>>(),
        admission: known.admission.clone(),
        deadline: known.deadline,
        reserved: &known.reserved,
    };
    Ok(commands(&interface, &device, &preview(parts, &device, Clocks::read())))
}
