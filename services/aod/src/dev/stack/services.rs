//! The services of a stack, with their settings.

use rustix::process::Signal;

use crate::dev::{
    DevError,
    stack::{DATABASE, Stack},
    supervisor::{Probe, Spec},
    tools,
};

/// What services get from files of their own: other processes of the user may read an environment.
const SECRETS: &[&str] = &[
    "AOD_DEPLOYMENT_ID",
    "DATABASE_URL",
    "FIELD_ENCRYPTION_KEY",
    "LOCAL_SPRITES_TOKEN",
    "NATS_PASSWORD",
];

impl Stack {
    /// The services, their settings and where they tell that they are ready.
    pub(super) fn services(&self) -> Result<Vec<Spec>, DevError> {
        let secrets = &self.data.secrets;
        let settings = &self.settings;
        let mut ports = self.admin.iter().copied();
        let mut specs = Vec::new();
        let mut add = |name: String,
                       program: &'static str,
                       env: Vec<(&str, String)>|
         -> Result<(), DevError> {
            let admin = ports.next().ok_or_else(|| DevError::Broken("no free port".to_owned()))?;
            let given = |(variable, value): (&str, String)| match SECRETS.contains(&variable) {
                true => self.data.write_secret(&name, variable, &value),
                false => Ok((variable.to_owned(), value)),
            };
            let set_here: Vec<&str> =
                env.iter().map(|(variable, _)| *variable).chain(["AOD_ADMIN_ADDR"]).collect();
            let defaults = [("AOD_STOP_GRACE_SECONDS", "3"), ("AOD_DRAIN_SECONDS", "0")];
            let defaults =
                defaults.map(|(variable, value)| (variable.to_owned(), value.to_owned()));
            let from_environment = settings.of(program, &set_here);
            let own = env.into_iter().map(given).collect::<Result<Vec<_>, _>>()?;
            let admin_addr = ("AOD_ADMIN_ADDR".to_owned(), admin.to_string());
            let env = defaults
                .into_iter()
                .chain(from_environment)
                .chain(own)
                .chain([admin_addr])
                .collect();
            specs.push(Spec {
                log: self.data.join(&format!("logs/{name}.log")),
                name,
                service: program,
                program: self.tools.services.join(program),
                args: Vec::new(),
                env,
                user: None,
                // It ends what runs in the Sprites too.
                stop_signal: if program == "local-sprites" { Signal::INT } else { Signal::TERM },
                probe: Probe::Ready(admin),
            });
            Ok(())
        };
        let nats = |user: &str| {
            vec![
                ("NATS_URL", self.nats_url()),
                ("NATS_PASSWORD", secrets.nats_password(user).to_owned()),
            ]
        };
        let database = |service: &str| {
            (
                "DATABASE_URL",
                self.database_url(service, secrets.service_password(service), DATABASE),
            )
        };

        let mut sprites = vec![
            ("LOCAL_SPRITES_ADDR", self.sprites.to_string()),
            ("LOCAL_SPRITES_TOKEN", secrets.sprites_token.clone()),
            ("LOCAL_SPRITES_DATA_DIR", self.data.join("sprites").display().to_string()),
        ];
        // What Sprites reach of this machine: the model gateway, the model, and what the user
        // names.
        let named = tools::env("LOCAL_SPRITES_PRIVATE_HOSTS").unwrap_or_default();
        let own = self.model_gateways().chain(self.model).map(|addr| addr.to_string());
        // The model gateway reaches these for them, where they are MCP servers.
        let private_hosts = (!settings.has("AOD_MODEL_GATEWAY_PRIVATE_HOSTS"))
            .then(|| ("AOD_MODEL_GATEWAY_PRIVATE_HOSTS", named.clone()));
        let private: Vec<String> = own.chain([named]).filter(|host| !host.is_empty()).collect();
        sprites.push(("LOCAL_SPRITES_PRIVATE_HOSTS", private.join(",")));
        sprites.push(("LOCAL_SPRITES_ROOTFS", self.tools.rootfs.display().to_string()));
        sprites.extend(
            self.tools
                .agents
                .as_ref()
                .map(|dir| ("LOCAL_SPRITES_AGENTS_DIR", dir.display().to_string())),
        );
        sprites.push(("LOCAL_SPRITES_AGENT_HOST", self.tools.agent_host.display().to_string()));
        add("local-sprites".to_owned(), "local-sprites", sprites)?;
        if let Some(model) = self.model {
            add(
                "scripted-model".to_owned(),
                "scripted-model",
                vec![("SCRIPTED_MODEL_ADDR", model.to_string())],
            )?;
        }
        for name in self.replicas_of("auth") {
            add(name, "auth", [nats("auth"), vec![database("auth")]].concat())?;
        }
        for name in self.replicas_of("credential-vault") {
            let vault =
                vec![database("vault"), ("FIELD_ENCRYPTION_KEY", secrets.encryption_key.clone())];
            add(name, "credential-vault", [nats("vault"), vault].concat())?;
        }
        let files = (!settings.has("AOD_FILES_URL"))
            .then(|| ("AOD_FILES_URL", format!("file://{}", self.data.join("files").display())));
        for name in self.replicas_of("scheduler") {
            let deployment = ("AOD_DEPLOYMENT_ID", secrets.deployment_id.clone());
            add(
                name,
                "scheduler",
                [
                    nats("scheduler"),
                    vec![database("scheduler"), deployment],
                    files.clone().into_iter().collect(),
                ]
                .concat(),
            )?;
        }
        let models = [
            "AOD_MODEL_BASE_URL_ANTHROPIC",
            "AOD_MODEL_BASE_URL_OPENAI",
            "AOD_MODEL_BASE_URL_GOOGLE",
        ];
        let scripted = self.model.map(|model| format!("http://{model}"));
        let scripted: Vec<(&str, String)> = models
            .into_iter()
            .filter(|name| !settings.has(name))
            .filter_map(|name| Some((name, scripted.clone()?)))
            .collect();
        for (name, addr) in self.replicas_of("model-gateway").zip(self.model_gateways()) {
            let listen = vec![("AOD_MODEL_GATEWAY_ADDR", addr.to_string())];
            let private = private_hosts.clone().into_iter().collect();
            add(
                name,
                "model-gateway",
                [nats("model_gateway"), listen, scripted.clone(), private].concat(),
            )?;
        }
        for number in 1..=self.runners {
            let mut runner = nats("runner");
            runner.extend(files.clone());
            let sprites =
                self.other_sprites.clone().unwrap_or_else(|| format!("http://{}", self.sprites));
            runner.push(("SPRITES_BASE_URL", sprites));
            runner.push(("AOD_AGENT_HOST", self.tools.agent_host.display().to_string()));
            runner.extend(scripted.clone());
            // The user's own names a balancer in front of these.
            runner.extend(
                self.model_gateway
                    .filter(|_| !settings.has("AOD_MODEL_GATEWAY_URL"))
                    .map(|addr| ("AOD_MODEL_GATEWAY_URL", format!("http://{addr}"))),
            );
            runner.extend(private_hosts.clone());
            add(format!("sprite-runner-{number}"), "sprite-runner", runner)?;
        }
        for (name, addr) in self.replicas_of("gateway").zip(self.apis()) {
            let gateway = vec![
                ("AOD_LISTEN_ADDR", addr.to_string()),
                ("ENABLE_SHELL_RUNTIME", "true".to_owned()),
            ];
            let files = files.clone().into_iter().collect();
            add(name, "gateway", [nats("gateway"), gateway, files].concat())?;
        }
        Ok(specs)
    }

    /// `auth`, `auth-2` and so on.
    fn replicas_of(&self, service: &'static str) -> impl Iterator<Item = String> + use<> {
        (1..=self.replicas).map(move |number| {
            if number == 1 { service.to_owned() } else { format!("{service}-{number}") }
        })
    }
}
