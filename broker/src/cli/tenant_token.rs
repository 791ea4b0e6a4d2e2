//! `tenant-token`: a token by which clients may join a tenant, and its line for `tenants.tokens_file`.

use clap::Args;

use crate::cli::MAKE_ENDS;
use crate::cli::admin_client::random_token;
use crate::tenants::TenantId;
use crate::tenants::tokens::hash;

/// The command `tenant-token`.
#[derive(Debug, Args)]
#[command(after_help = MAKE_ENDS)]
pub struct TenantToken {
    /// The tenant's id, as it is without percent-encoding
    tenant: String,
}

impl TenantToken {
    /// A new token, and what to do with it.
    pub fn text(&self) -> anyhow::Result<String> {
        let tenant = TenantId::new(&self.tenant)?;
        anyhow::ensure!(!self.tenant.contains(['\n', '\r']), "a tenant's id in the file of tokens has one line");
        let token = random_token()?;
        let hash = hex::encode(hash(&token));
        Ok(format!(
            "The token, for \"Authorization: Bearer TOKEN\" or, from browsers, ?token=TOKEN:\n{token}\n\
             A line for the file that tenants.tokens_file of the broker's config names:\n{hash} {}\n",
            tenant.as_str()
        ))
    }
}
