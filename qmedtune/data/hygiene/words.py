"""Words that tell a name from what stands beside one in a note.

`NEVER` are no part of a name wherever they stand; surnames that are also words (White, Young, May) are not among them.
`EPONYMS` are names, but of diseases, signs and drugs where no title says otherwise. Hand-made; what is missing makes a
redaction longer (a word beside a name is taken with it), never shorter.
"""

# ruff: noqa: SIM905 (a list of words reads better as words)

from __future__ import annotations

_GRAMMAR = """
    a about above after again all also although always am an and any are around as at be because been before being
    below between both but by can cannot could daily did do does doing done down during each either else every
    few first for from further had has have having he hello her here hers herself him himself his how however i
    if in into is it its itself just last least less like many may me might more most much must my myself near
    never new next no none nor not nothing now of off often on once one only or other our out over own part per
    please prior pt pts same second see seen several shall she should since so some still such than that the
    their them then there these they this those though three through thus to today together tomorrow tonight too
    two under until up upon us use used very via was we well were what when where whether which while who whom
    whose why with within without would year years yes yesterday yet you your dr drs mr mrs ms miss prof
    professor md phd unknown other n/a na tbd withheld pending deferred unable anonymous redacted""".split()

_VERBS = """
    accepted added adjusted administered admitted advised agree agreed agrees alert ambulating answered arrived
    arrives ask asked asks assessed assisted attempted attended available aware based began begin brought call
    called calling calls came cancelled care cared changed charted checked cleared complained complains
    completed confirmed consult consulted contacted continue continued continues coordinated counseled decided
    declined declines decreased denied denies deny developed diagnosed discharge discharged discontinued discuss
    discussed documented drinks eats educated elected endorsed endorses ensure evaluate evaluated examined
    expired expressed failed feels felt fell follow followed following follows found gave given gives go goes
    going got held help hold improved improving include included including increased indicated informed
    initiated instructed known let lives lived made make managed meet met monitor monitored moved needed needs
    noted notes notified notify obtained offered operated order ordered orders page paged performed placed plan
    planned planning prescribed presented presenting presents provided provides put reached reads received
    recommend recommended recommends referred refused refuses remained remains removed repeat reported reports
    request requested requests requires resolved responded responds rest resting return returned reviewed said
    saw says scheduled seems sent signed sleeping smokes spoke stable started states stated stopped takes taken
    taking telephoned tolerated tolerating told took transfer transferred transported treated treating tried
    understands updated verbalized verified visit visited visiting visits walked wants will wishes woke worsened
    writes wrote dictated reviewing speaking asking signing rounding covering attending assessing""".split()

_CLINICAL = """
    abdomen abdominal abnormal access accident accession account activity acute address admission admit adult age
    aged alcohol allergies allergy anemia anesthesia anesthesiologist anesthesiology antibiotic antibiotics
    anticoagulation anxiety appointment appt arm arrival arterial artery assessment associate asthma atrial
    author back bed bedside behavioral bilateral bilirubin biopsy birth bleeding blood bmi board body bone bowel
    brain breast breath bronchitis cancer carcinoma cardiac cardiologist cardiology cardiothoracic
    cardiovascular case cast catheter cause cell center centre cervical chart chemistry chemotherapy chest chief
    child children childrens chronic cirrhosis class clinic clinical clinician code cold colitis colon
    colonoscopy comfort comment comments community complaint complaints complete complications concern condition
    congestive consent consultant consultants consultation contact contractions control copy coronary cough
    course creatinine critical culture cultures cvs daughter date dates days death degree delivery dementia
    dental department depression dermatology diabetes diabetic diagnoses diagnosis dialysis diarrhea diet
    disease disposition distress division dizziness doctor doctors dob dod dos dose drip drug drugs echo edema
    effusion elderly electronically elevation emergency emergent encounter endocrine endocrinology endoscopy
    engl english equipment esophageal estimated evaluation evening event exam examination exercise exit
    extremities extremity eye eyes facility failure fall family father fax female fever fibrillation final
    findings fluid fluids follow-up food foot fracture friday full function gastric gastroenterology
    gastrointestinal gender general gentleman geriatric geriatrics glucose good goals grade group guardian
    gynecology hand head headache health healthcare hearing heart hematocrit hematology hemoglobin hepatic
    hepatitis high hip hispanic history home hospice hospital hospitalist hospitals hour hours hypertension icu
    id identification illness imaging impression incision infection infectious infirmary information initial
    initials injury inpatient insulin insurance intake intensive intern internal intervention interpreter
    intubation issues kidney knee lab labor laboratory labs laparoscopic left leg legal lesion level license
    life line lipid list liver local location loss low lower lumbar lung lungs lymph lymphoma male man
    management marital mass maternal mechanical medical medication medications medicine member mental metabolic
    microbiology midwife mild minutes moderate monday month months morning mother motor mouth mr mri mrn name
    names nasal nausea neck negative neonatal nephrology nerve neuro neurologic neurological neurologist
    neurology neurosurgery newborn night nkda nodes normal note notes number numbers nurse nurses nursing
    nutrition ob observation obstetrics occupation occupational office old oncologist oncology operation
    operative ophthalmology oral orthopedic orthopedics orthopaedics outpatient outside oxygen pager pain
    palliative pancreatitis parent parents parking past patent path pathologist pathology patient patients pcp
    pediatric pediatrics pelvic pelvis penicillin pericardial peripheral pharmacist pharmacy phone physical
    physician physicians place plain plastic plate pleural pneumonia podiatry policy positive possible post
    postoperative practitioner pregnancy preliminary preoperative prescription present presentation pressure
    previous primary problem problems procedure procedures progress prognosis prostate protocol provider
    providers psychiatric psychiatrist psychiatry psychology pulmonary pulse pupils quality race radiation
    radiologist radiology rash rate reason reasons recommendation recommendations record records rectal
    recurrent redness referral referring reflux registered registration regular regarding rehab rehabilitation
    relation relationship religion renal report resident residents respiratory response result results
    resuscitation review reviewed rheumatology rhythm right risk room round rounds routine rule sample saturday
    saturation scan schedule scheduled school section seizure seizures sepsis septic serial serum service
    services severe sex shift shock shortness side sign signature signs sinus site skilled skin sleep smoking
    social son spanish special specialist specialty specimen spinal spine spouse staff standard state status
    sternal stomach street stress stroke strong student subjective subscriber summary sunday support surgeon
    surgeons surgery surgical sutures swelling symptoms syncope syndrome system systems tablet tablets team
    telephone temperature test tests therapist therapy thoracic throat thursday thyroid time tissue title
    tobacco tone total toxicology trachea transfusion transplant trauma treatment trial trouble tube tuesday
    tumor type ulcer ultrasound unit units unremarkable upper urgent urinary urine urology uterine vaccination
    vaccine vaginal valve vascular venous ventricular vision vital vitals volume vomiting wall ward wednesday
    week weekly weeks weight white-cell woman wound wounds wrist january february march april june july august
    september october november december daytime spouse's significant subject emergency instructions education
    assistant aide extender calle avda avenida ctra carretera paseo camino apartado servicio paciente pacientes
    patiente se varon mujer direccion email e-mail correo nhc nocol presentamos informe active pre-op post-op
    demographics demographic next kin relative relatives supervising supervisor signed-by
    dictation signal imaging angiography angiogram venogram venography spectroscopy enterography elastography
    sequence sequences recovery stepdown telemetry preop postop endo brief transcribed transcriptionist cc attn re via
    ext tel cell mobile ward bed floor house officer director chair chairman fellow colleague colleagues sir
    madam everyone team concern whom department veterans university college institute
    healthy unhealthy alive well living deceased asymptomatic unaffected isolation required precautions droplet airborne
    uneventful estranged widowed divorced married diabetics hypertensive hypotensive obese epileptic asthmatic alcoholic
    smoker nonsmoker noncontributory reanimacion""".split()

_ACRONYMS = """
    abg adl afib aicd aids ama ards bid bmp bp bpm bun cabg cad cbc ccu cdiff chf cc cns co copd cpap cpr crna csf
    csn ct cva cxr dc dka dl dm dni dnr do dnp dpm dvt dx eats ecg echo ed ef egd ekg ent er esr esrd etoh facc
    facep facp facs fnp fu gcs gerd gi gu gyn hbv hcv hctz hiv hpi hr htn hx icd icu ii iii im inr ir iv ivf kg
    kub lad lft lll lpn lvef lvn mba mbbs mcg md meds mg mi micu ml mph mrn mrsa msw nad nicu npo nsr np
    npi nsaid od or ot pa pa-c pacu pcp pe pft pharmd phd picc picu pmh pod po pps prn psa pt ptsd pvd qd qid
    rbc rehab rn rn-bc rrt rx sicu snf sob sp spo sq ssn stat std svt tb tia tid tpn tsh us uti vre vs vss wbc
    wnl lcsw dds dmd ccrn rnc cnm cns bsn msn dob dos edd gp frcp frcs mrcp esq aprn arnp mbchb""".split()

NEVER = frozenset((*_GRAMMAR, *_VERBS, *_CLINICAL))
# In capitals or in small letters; `Ma`, `Do` and `Ng` are surnames.
ACRONYMS = frozenset(_ACRONYMS)
# Of NEVER, what is a surname right after a title.
SURNAMES = frozenset(
    """an april august back black bone brown call case chest child church cross day down early english few field
    first foot friday good hand head heart house june knee last late less like long march may minor monday
    neck next now off only other out over own page pain parent park past place power rule self service short
    so standard still street strong such ward week will winter young""".split()
)

EPONYMS = frozenset(
    """addison alzheimer apgar asperger babinski barrett bartholin bell bence brudzinski budd burkitt chagas charcot
    chiari colles cooley crohn cushing dercum down dupuytren ebstein ehlers ewing fallot fanconi foley fontan
    fournier friedreich gardner gaucher gilbert glasgow gleason goodpasture graves guillain hartmann hashimoto
    heimlich henoch hirschsprung hodgkin homan homans horner huntington kaposi kawasaki kerley kernig
    klinefelter kocher korsakoff legg lesch lewy lyme mallory marfan mcburney meckel meniere mohs morton
    munchausen murphy osgood osler paget pap parkinson peyronie pick pott prader prinzmetal raynaud reiter reye
    ringer roth rinne romberg salter schatzki sjogren still swan takayasu tay tinel tourette trendelenburg
    turner virchow weber wegener wernicke whipple wilms wilson wolff zenker abilify advair albuterol allopurinol
    amiodarone amlodipine amoxicillin aspirin atenolol ativan atorvastatin augmentin azithromycin bactrim
    benadryl captopril carvedilol celebrex celexa cephalexin ciprofloxacin clonazepam clopidogrel codeine colace
    coreg coumadin cymbalta diazepam digoxin dilantin dilaudid diltiazem diovan eliquis enalapril fentanyl
    flagyl flomax furosemide gabapentin glipizide haldol heparin humalog hydralazine hydrochlorothiazide
    ibuprofen imdur insulin keflex keppra klonopin lantus lasix levaquin levothyroxine lexapro lipitor
    lisinopril lopressor lorazepam losartan lovenox macrobid magnesium metformin methadone metoprolol midazolam
    miralax morphine motrin naproxen neurontin nexium norvasc omeprazole oxycodone pepcid percocet plavix
    potassium pravastatin prednisone prilosec propofol protonix prozac remeron rocephin seroquel sertraline
    simvastatin spironolactone synthroid tamiflu topamax toprol tramadol trazodone tylenol valium vancomycin
    vicodin warfarin xanax xarelto zantac zithromax zocor zofran zoloft zosyn""".split()
)

# Small words inside the name of a hospital, and words of such names that alone name none.
INSIDE = frozenset("of the and for de la del van von der den di da du at".split())
OF_HOSPITALS = frozenset(
    """day operating stay course new general memorial regional community university childrens children's county city
    state national royal central medical health veterans mount mt st saint north south east west northern southern
    eastern western heart cancer outside local our her his their a an this that another nearby area district
    teaching tertiary care community acute emergency women's womens""".split()
)


def any_never(value: str) -> bool:
    """Whether one of the words is no part of a name."""
    return any(word.lower().strip(".,") in NEVER for word in value.split())
